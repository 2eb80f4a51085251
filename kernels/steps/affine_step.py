"""One evaluation of an affine cell: product, offset, activation and residual sums in one launch.

Symbols: B samples of size n; W the weight, M the matrix (n, n) of the product ``point @ M.T``: W
itself in a forward solve, its transpose in an adjoint. Per sample (row) what its flags request, see
sample.py:

    FULL     pre = point @ M.T + offset, in float32           value = phi(pre), or slope * pre
    LOW      pre += change @ M.T, both factors in bfloat16    value = phi(pre), or slope * pre
    PRODUCT  value = point @ M.T, nothing else
    STOPPED  nothing: what is in the row is neither read nor written

For FULL and LOW also ``sums = |value - point|, |value|`` of each SUMS_COLUMNS outputs, and
``g = value - point`` where HISTORY says so. EVALUATED says what was done.

Tile layout: one program for BLOCK_M rows and BLOCK_N outputs, in steps of BLOCK_K inputs. Programs
with the same outputs follow each other, so that a tile of M comes from memory once and then from
the second-level cache. A tile without running rows returns at once. One in which every running row
requests LOW is multiplied in bfloat16; in any other the rows that request LOW are evaluated FULL.
What follows the product goes SUMS_COLUMNS outputs at a time, to need few registers. A wider tile of
the product therefore lies where ``value`` will be until its columns have their turn.

A ``product`` computed by the library (library_product.py) takes the place of the kernel's own: of
the LOW one with the precision schedule, of the FULL one without it.

Bytes per call: ``4 n^2`` (LOW: ``2 n^2``) of M for every row of tiles, from memory once; ``4 B n``
(``2 B n``) of points for every column of tiles; then per entry of (B, n) 4 for the offset (LOW:
pre), 4 for the point, 4 for the slope of an adjoint, written 4 for the value, 4 each for pre and g
where they are kept, and another 8 with a tile wider than SUMS_COLUMNS, which caches should hold.
Operations: ``2 B n^2``, and some 50 per entry for phi.

Precision of a FULL product: "ieee" is float32 throughout, by fused multiply-adds. "tf32x3" splits
each factor into two numbers of 11 bits, which leaves 2^-21 of it at most, and adds three of their
four products in tensor cores, which leaves out 2^-22. So a term is off by at most 2^-19 = 2e-6 of
itself, where a fused multiply-add has none. Sums are float32 in both, but tensor cores may truncate
where arithmetic rounds. By its data sheet the tensor cores of an H100 have 7 times the throughput
of its float32 arithmetic, so that three products cost less than one.

Tiles: see tile_choice.py. Which one is best is found on the first call with a size, by Triton's
autotuner, which keeps it on disk. Measuring repeats the launch. A launch reads no output but
``pre``, to which LOW ones add, and measures on a copy of that; so the launch after it finds what it
needs, and writes all outputs again. With a product of the library nothing is measured: a tile then
does as much work as its rows happen to request.

With few samples and n below about 4000 there are fewer programs than multiprocessors: sums over K
are not split.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device, product_precision
from .affine_tile import (
    INTERPRETED,
    SUMS_COLUMNS,
    check_strides,
    finish,
    load_product,
    multiply,
    sums_of,
)
from .sample import LOW, REQUESTED, STOPPED, Samples
from .tile_choice import TILES, Tile, default_tile, tuner


@triton.jit(do_not_specialize=["batch_bucket"])
def affine_step_kernel(
    point_ptr,
    weight_ptr,
    change_ptr,
    low_ptr,  # the weight in bfloat16
    product_ptr,  # (B, n), computed by the library
    offset_ptr,
    slope_ptr,
    value_ptr,
    g_ptr,
    pre_ptr,
    sums_ptr,
    flags_ptr,
    batch,
    size,
    tiles,
    weight_stride_output,
    weight_stride_input,
    low_stride_output,
    low_stride_input,
    value_stride,
    g_stride,
    flags_stride,
    batch_bucket,  # for the autotuner
    ACTIVATION: tl.constexpr,
    AT_ZERO: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOW_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    requested = tl.load(flags_ptr + row * flags_stride + REQUESTED, mask=row < batch, other=STOPPED)
    if tl.max(requested, axis=0) == STOPPED:
        return
    used = requested != STOPPED
    SCHEDULE: tl.constexpr = change_ptr is not None and not AT_ZERO
    low = tl.min(tl.where(used & (requested != LOW), 0, 1), axis=0) != 0
    if not SCHEDULE:
        low = low & (size < 0)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Nested: the compiler knows the first condition.
    if SCHEDULE:  # noqa: SIM102
        if low:
            if product_ptr is not None:
                product = load_product(product_ptr, used, column, size, BLOCK_M)
            else:
                product = multiply(
                    rows_ptr=change_ptr,
                    weight_ptr=low_ptr,
                    used=used,
                    column=column,
                    size=size,
                    stride_output=low_stride_output,
                    stride_input=low_stride_input,
                    PRECISION="ieee",
                    BLOCK_M=BLOCK_M,
                    BLOCK_N=BLOCK_N,
                    BLOCK_K=LOW_K,
                )
    if not AT_ZERO:
        if product_ptr is not None and not SCHEDULE:
            product = load_product(product_ptr, used, column, size, BLOCK_M)
        elif not low:
            product = multiply(
                rows_ptr=point_ptr,
                weight_ptr=weight_ptr,
                used=used,
                column=column,
                size=size,
                stride_output=weight_stride_output,
                stride_input=weight_stride_input,
                PRECISION=PRECISION,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
            )
    tile_row = tl.arange(0, BLOCK_M)[:, None]
    tile_ptr = value_ptr + tl.program_id(0).to(tl.int64) * BLOCK_M * value_stride
    if BLOCK_N > SUMS_COLUMNS:
        mask = used[:, None] & (column < size)[None, :]
        tl.store(tile_ptr + tile_row * value_stride + column[None, :], product, mask=mask)
        tl.debug_barrier()
    last_column = tl.minimum(first_column + BLOCK_N, size)
    for at in tl.range(first_column, last_column, SUMS_COLUMNS, num_stages=1):
        if BLOCK_N > SUMS_COLUMNS:
            part = at + tl.arange(0, SUMS_COLUMNS)
            there = used[:, None] & (part < size)[None, :]
            part_ptr = tile_ptr + tile_row * value_stride + part[None, :]
            columns = tl.load(part_ptr, mask=there, other=0.0)
        else:
            columns = product
        finish(
            product=columns,
            low=low,
            requested=requested,
            first_column=at,
            size=size,
            tiles=tiles,
            point_ptr=point_ptr,
            offset_ptr=offset_ptr,
            slope_ptr=slope_ptr,
            value_ptr=value_ptr,
            g_ptr=g_ptr,
            pre_ptr=pre_ptr,
            sums_ptr=sums_ptr,
            flags_ptr=flags_ptr,
            value_stride=value_stride,
            g_stride=g_stride,
            flags_stride=flags_stride,
            ACTIVATION=ACTIVATION,
            AT_ZERO=AT_ZERO,
            SCHEDULE=SCHEDULE,
            BLOCK_M=BLOCK_M,
        )


_tuners = {aligned: tuner(affine_step_kernel, aligned) for aligned in (True, False)}
_measured: dict[tuple, triton.Config] = {}
_measuring = threading.Lock()  # a backward pass has a thread for each GPU


def affine_step(
    samples: Samples,
    weight: Tensor,
    low_weight: Tensor | None,
    point: Tensor,
    value: Tensor,
    residual: Tensor | None = None,
    activation: int | None = None,
    *,
    at_zero: bool = False,
    product: Tensor | None = None,
    precision: str | None = None,
    tile: Tile | None = None,
) -> None:
    """Evaluates the rows of ``point`` ``(B, n)`` for which ``samples.flags`` request it.

    ``weight`` is M of ``point @ M.T``, float32 with any strides, ``low_weight`` the same in
    bfloat16 where low-precision evaluations are possible (then ``samples`` has ``pre`` and
    ``change``). ``activation`` is an index of ``activations.INDEX``, or None for ``samples.slope *
    pre``. Writes ``value`` ``(B, n)``, ``residual`` ``(B, n)`` (both may be slots of a history: the
    last stride is 1), and what else ``samples`` has: see above. ``at_zero`` says that the point is
    zero: it is not read, and there is no product. ``product`` ``(B, n)`` is that of the library.

    Without a ``tile`` the first call with a size measures which one is best, except under the
    interpreter, while a CUDA graph is captured, and with a ``product``.
    """
    batch, size = point.shape
    if batch == 0 or size == 0:
        return
    check_strides(*weight.stride(), value.stride(0))
    change = None if low_weight is None else samples.change
    matrices = [weight] if change is None else [weight, low_weight]
    aligned = size % 16 == 0 and all(
        1 in m.stride() and max(m.stride()) % 16 == 0 for m in matrices
    )
    precision = precision or product_precision(point)
    bucket = triton.next_power_of_2(batch)
    low_strides = (0, 0) if change is None else low_weight.stride()

    def grid(blocks: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(batch, blocks["BLOCK_M"]), triton.cdiv(size, blocks["BLOCK_N"])

    def launch(kernel: Any, pre: Tensor | None, **blocks: Any) -> None:
        kernel[grid](
            point_ptr=point,
            weight_ptr=weight,
            change_ptr=change,
            low_ptr=None if change is None else low_weight,
            product_ptr=product,
            offset_ptr=samples.offset,
            slope_ptr=samples.slope if activation is None else None,
            value_ptr=value,
            g_ptr=residual,
            pre_ptr=pre,
            sums_ptr=samples.sums,
            flags_ptr=samples.flags,
            batch=batch,
            size=size,
            tiles=sums_of(size),
            weight_stride_output=weight.stride(0),
            weight_stride_input=weight.stride(1),
            low_stride_output=low_strides[0],
            low_stride_input=low_strides[1],
            value_stride=value.stride(0),
            g_stride=0 if residual is None else residual.stride(0),
            flags_stride=samples.flags.stride(0),
            batch_bucket=bucket,
            ACTIVATION=-1 if activation is None else activation,
            AT_ZERO=at_zero,
            PRECISION=precision,
            enable_fp_fusion=True,
            **blocks,
        )

    with on_device(point):
        key = (size, bucket, precision, aligned, point.device)
        if tile:
            config = tile.config()
        elif product is not None:  # without the schedule there is nothing to multiply
            library_tile = default_tile(batch, size, aligned, precision, library=True)
            config = (TILES[0] if change is None else library_tile).config()
        else:
            config = _measured.get(key)
        if config is None:
            measures = point.is_cuda and not (at_zero or INTERPRETED.value)
            if measures and not torch.cuda.is_current_stream_capturing():
                with _measuring:
                    tuned = _tuners[aligned]
                    launch(tuned, None if samples.pre is None else samples.pre.clone())
                    config = _measured[key] = tuned.best_config
            else:
                config = default_tile(batch, size, aligned, precision).config()
        launch(affine_step_kernel, samples.pre, **config.all_kwargs())
