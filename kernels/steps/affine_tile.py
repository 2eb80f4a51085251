"""What the step kernel does with a tile: makes or loads the product, and all that follows it.

Symbols and formulas: affine_step.py, whose programs have rows along axis 0 of the grid and outputs
along axis 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import activate
from .sample import EVALUATED, FULL, HISTORY, LOW, PRODUCT, STOPPED

SUMS_COLUMNS = tl.constexpr(32)  # outputs to an entry of the sums
# Entries beyond LARGE are multiplied by SHRINK, a power of two, before they are squared: up to
# 2^128 / 2^66 each, so that 16 of the largest do not overflow.
LARGE = tl.constexpr(2.0**59)
SHRINK = tl.constexpr(2.0**-67)
# The interpreter's dot takes bfloat16 for integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def sums_of(size: int) -> int:
    """T, the entries of ``sums (B, T, 2)``."""
    return triton.cdiv(size, SUMS_COLUMNS.value)


def check_strides(*strides: int) -> None:
    """Offsets in a tile have 32 bits."""
    if max(strides) >= 1 << 24:
        raise RuntimeError("an affine step takes strides below 2^24")


@triton.jit
def row_norm(rows):
    """2-norms (M,) of rows (M, N), also of entries whose squares leave the range of float32."""
    scale = tl.where(tl.max(tl.abs(rows), axis=1) > LARGE, SHRINK, 1.0)
    scaled = rows * scale[:, None]
    return tl.sqrt_rn(tl.sum(scaled * scaled, axis=1)) / scale


@triton.jit
def multiply(
    rows_ptr,
    weight_ptr,
    used,
    column,
    size,
    stride_output,
    stride_input,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The program's tile of ``rows @ W.T``; 0 in rows that are not ``used``."""
    # Offsets in a tile fit 32 bits, and take half the registers of pointers. Where it begins is 64.
    k = tl.arange(0, BLOCK_K)
    rows_entry = tl.arange(0, BLOCK_M)[:, None] * size + k[None, :]
    weight_entry = tl.arange(0, BLOCK_N)[None, :] * stride_output + k[:, None] * stride_input
    rows_ptr += tl.program_id(0).to(tl.int64) * BLOCK_M * size
    weight_ptr += tl.program_id(1).to(tl.int64) * BLOCK_N * stride_output
    step = tl.cast(stride_input, tl.int64) * BLOCK_K
    exists = (column < size)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, size, BLOCK_K):
        inside = k < size - start
        rows = tl.load(rows_ptr + rows_entry, mask=used[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_ptr + weight_entry, mask=inside[:, None] & exists, other=0.0)
        if INTERPRETED:
            rows, weight = rows.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(rows, weight, total, input_precision=PRECISION)
        rows_ptr += BLOCK_K
        weight_ptr += step
    return total


@triton.jit
def load_product(product_ptr, used, column, size, BLOCK_M: tl.constexpr):
    """The program's tile of a product (B, n) that exists; 0 in rows that are not ``used``."""
    entry = tl.arange(0, BLOCK_M)[:, None] * size + column[None, :]
    product_ptr += tl.program_id(0).to(tl.int64) * BLOCK_M * size
    mask = used[:, None] & (column < size)[None, :]
    return tl.load(product_ptr + entry, mask=mask, other=0.0)


@triton.jit
def finish(
    product,
    low,
    requested,
    first_column,
    size,
    tiles,
    point_ptr,
    offset_ptr,
    slope_ptr,
    value_ptr,
    g_ptr,
    pre_ptr,
    sums_ptr,
    flags_ptr,
    value_stride,
    g_stride,
    flags_stride,
    ACTIVATION: tl.constexpr,
    AT_ZERO: tl.constexpr,
    SCHEDULE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What follows the ``product``, for SUMS_COLUMNS outputs; ``low``: it is one of a change."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, SUMS_COLUMNS)
    entry = row[:, None] * size + column[None, :]
    inside = (column < size)[None, :]
    evaluated = (requested == FULL) | (requested == LOW)
    mask = evaluated[:, None] & inside
    if SCHEDULE:
        if low:
            base = tl.load(pre_ptr + first_row * size + entry, mask=mask, other=0.0)
        else:
            base = tl.load(offset_ptr + first_row * size + entry, mask=mask, other=0.0)
    else:
        base = tl.load(offset_ptr + first_row * size + entry, mask=mask, other=0.0)
    pre = product + base
    if pre_ptr is not None:
        tl.store(pre_ptr + first_row * size + entry, pre, mask=mask)
    if slope_ptr is None:
        value = activate(pre, ACTIVATION)
    else:
        slope = tl.load(slope_ptr + first_row * size + entry, mask=mask, other=0.0)
        value = slope * pre
    value = tl.where(mask, value, 0.0)
    g = value
    if not AT_ZERO:
        g -= tl.load(point_ptr + first_row * size + entry, mask=mask, other=0.0)
    flags_ptr += (first_row + row) * flags_stride
    if g_ptr is not None:
        kept = tl.load(flags_ptr + HISTORY, mask=evaluated, other=0) != 0
        g_ptr += first_row * g_stride + row[:, None] * g_stride + column[None, :]
        tl.store(g_ptr, g, mask=mask & kept[:, None])
    is_product = requested == PRODUCT
    stored = tl.where(is_product[:, None], product, value)
    value_ptr += first_row * value_stride + row[:, None] * value_stride + column[None, :]
    tl.store(value_ptr, stored, mask=(requested != STOPPED)[:, None] & inside)
    sums_ptr += ((first_row + row) * tiles + first_column // SUMS_COLUMNS) * 2
    tl.store(sums_ptr, row_norm(g), mask=evaluated)
    tl.store(sums_ptr + 1, row_norm(value), mask=evaluated)
    kind = tl.where(is_product, PRODUCT, tl.where(low, LOW, FULL))
    tl.store(flags_ptr + EVALUATED, kind, mask=tl.where(requested != STOPPED, first_column, 1) == 0)
