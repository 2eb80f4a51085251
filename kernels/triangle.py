"""One evaluation of an affine cell with a symmetric weight, of which one triangle is read.

Symbols: W = W^T (n, n); B = 1 or 2 samples; everything else as in affine_step.py, the flags
included. With so few samples an evaluation takes the time in which W is read, and half of W says
all: a tile W_ij above the diagonal gives two parts of the product

    y_i += W_ij x_j,    y_j += W_ij^T x_i,    and one on the diagonal  y_i += W_ii x_i.

Tile layout: one program for a tile of TILE x TILE entries, with T = ceil(n / TILE); the rows i and
T - 1 - i of the triangle have T + 1 tiles together and lie in one row of the grid. The part of y_i
that belongs to x_j goes to ``parts (B, T, T, TILE)`` at [i, j], where no other program writes. A
second kernel, one program for SUMS_COLUMNS outputs, adds the parts in the order of j, so results do
not depend on the schedule, and does what follows the product. Products are IEEE float32; there are
no narrow ones: rows that want NARROW are made EXACT.

Bytes per call: ``2 n (n + TILE)`` for W, ``8 B n^2 / TILE`` for the parts, written and read: with
TILE = 64 and B = 1, 6 % of what is read of W; a cache may hold them. Operations: ``2 B n^2``, half
an operation to a byte for B = 1. Of the other triangle only the
tiles on the diagonal are read.

Compared with float64 by Triton's interpreter on a CPU; compiled for sm_80 and sm_90. No GPU has run
it: the tile is a choice, not a measurement.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine_tile import SUMS_COLUMNS, check_strides, finish, sums_of
from .sample import STOPPED, WANTED, Samples

MAX_SAMPLES = 2
TILE = 64
_PARTS = 32  # parts added at a time


@triton.jit
def triangle_kernel(
    point_ptr,
    weight_ptr,
    parts_ptr,
    flags_ptr,
    size,
    weight_stride_row,
    weight_stride_column,
    flags_stride,
    BATCH: tl.constexpr,
    TILE: tl.constexpr,
):
    """The parts of ``W point``."""
    wanted = 0
    for sample in tl.static_range(BATCH):
        wanted += tl.load(flags_ptr + sample * flags_stride + WANTED)
    if wanted == STOPPED:
        return
    tiles = tl.cdiv(size, TILE)
    first = tl.program_id(1)
    place = tl.program_id(0)
    is_first = place < tiles - first
    i = tl.where(is_first, first, tiles - 1 - first)
    j = tl.where(is_first, first + place, place - 1)
    # The row in the middle is its own partner.
    if (is_first == 0) & (2 * first == tiles - 1):
        return
    local = tl.arange(0, TILE)
    row = i * TILE + local
    column = j * TILE + local
    weight_ptr += (i * TILE).to(tl.int64) * weight_stride_row
    weight_ptr += (j * TILE).to(tl.int64) * weight_stride_column
    entry = local[:, None] * weight_stride_row + local[None, :] * weight_stride_column
    inside = (row < size)[:, None] & (column < size)[None, :]
    weight = tl.load(weight_ptr + entry, mask=inside, other=0.0)
    for sample in tl.static_range(BATCH):
        if tl.load(flags_ptr + sample * flags_stride + WANTED) != STOPPED:
            point = point_ptr + sample * size
            parts = parts_ptr + sample * tiles.to(tl.int64) * tiles * TILE + local
            at_column = tl.load(point + column, mask=column < size, other=0.0)
            of_row = tl.sum(weight * at_column[None, :], axis=1)
            tl.store(parts + (i.to(tl.int64) * tiles + j) * TILE, of_row)
            if i != j:
                at_row = tl.load(point + row, mask=row < size, other=0.0)
                of_column = tl.sum(weight * at_row[:, None], axis=0)
                tl.store(parts + (j.to(tl.int64) * tiles + i) * TILE, of_column)


@triton.jit
def triangle_finish_kernel(
    parts_ptr,
    point_ptr,
    offset_ptr,
    slope_ptr,
    value_ptr,
    g_ptr,
    pre_ptr,
    sums_ptr,
    flags_ptr,
    size,
    sums_tiles,
    value_stride,
    g_stride,
    flags_stride,
    ACTIVATION: tl.constexpr,
    SLOPE_ONLY: tl.constexpr,
    BATCH: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Adds the parts, and what follows."""
    row = tl.arange(0, BATCH)
    wanted = tl.load(flags_ptr + row * flags_stride + WANTED)
    if tl.max(wanted, axis=0) == STOPPED:
        return
    tiles = tl.cdiv(size, TILE)
    first_column = tl.program_id(1) * SUMS_COLUMNS
    column = first_column % TILE + tl.arange(0, SUMS_COLUMNS)
    parts_ptr += (first_column // TILE).to(tl.int64) * tiles * TILE
    part = tl.arange(0, PARTS)
    sample = row.to(tl.int64) * tiles * tiles * TILE
    entry = sample[:, None, None] + (part * TILE)[None, :, None] + column[None, None, :]
    used = (wanted != STOPPED)[:, None, None]
    total = tl.zeros((BATCH, PARTS, SUMS_COLUMNS), tl.float32)
    for start in range(0, tiles, PARTS):
        there = used & (part < tiles - start)[None, :, None]
        total += tl.load(parts_ptr + start * TILE + entry, mask=there, other=0.0)
    finish(
        tl.sum(total, axis=1),
        first_column < 0,
        wanted,
        first_column,
        size,
        sums_tiles,
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
        ACTIVATION,
        False,
        SLOPE_ONLY,
        False,
        BATCH,
    )


def parts_of(batch: int, size: int) -> tuple[int, int, int, int]:
    """The shape of ``parts``."""
    tiles = triton.cdiv(size, TILE)
    return batch, tiles, tiles, TILE


def triangle_step(
    samples: Samples,
    weight: Tensor,
    parts: Tensor,
    point: Tensor,
    value: Tensor,
    residual: Tensor | None = None,
    activation: int | None = None,
    *,
    slope_only: bool = False,
) -> None:
    """``affine_step`` for a symmetric ``weight`` and at most ``MAX_SAMPLES`` rows.

    Reads the upper triangle of ``weight``, and the lower half of the tiles on its diagonal. The
    contents of ``parts``, contiguous float32 of shape ``parts_of(B, n)``, need not survive.
    """
    batch, size = point.shape
    if batch > MAX_SAMPLES:
        raise RuntimeError(f"triangle_step: at most {MAX_SAMPLES} samples, got {batch}")
    if batch == 0 or size == 0:
        return
    check_strides(*weight.stride(), value.stride(0))
    tiles = triton.cdiv(size, TILE)
    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(point) if point.is_cuda else nullcontext():
        triangle_kernel[(tiles + 1, (tiles + 1) // 2)](
            point,
            weight,
            parts,
            samples.flags,
            size,
            *weight.stride(),
            samples.flags.stride(0),
            BATCH=batch,
            TILE=TILE,
            num_warps=4,
            enable_fp_fusion=True,
        )
        triangle_finish_kernel[(1, sums_of(size))](
            parts,
            point,
            samples.offset,
            samples.slope if activation is None else None,
            value,
            residual,
            samples.pre,
            samples.sums,
            samples.flags,
            size,
            sums_of(size),
            value.stride(0),
            0 if residual is None else residual.stride(0),
            samples.flags.stride(0),
            ACTIVATION=-1 if activation is None else activation,
            SLOPE_ONLY=slope_only,
            BATCH=batch,
            TILE=TILE,
            PARTS=_PARTS,
            num_warps=4,
            enable_fp_fusion=True,
        )
