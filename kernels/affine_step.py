"""One evaluation of an affine cell: product, offset, activation and residual sums in one launch.

Symbols: B samples of size n; W the weight, M the matrix (n, n) of which ``point @ M.T`` is made: W
itself in a forward solve, its transpose in an adjoint. Per sample (row) what its flags want,
see sample.py:

    EXACT    pre = point @ M.T + offset, in float32           value = phi(pre), or slope * pre
    NARROW   pre += change @ M.T, both factors in bfloat16    value = phi(pre), or slope * pre
    PRODUCT  value = point @ M.T, nothing else
    STOPPED  nothing: what is in the row is neither read nor written

For EXACT and NARROW also ``sums = |value - point|^2, |value|^2`` of each SUMS_COLUMNS outputs, and
``g = value - point`` where HISTORY says so. MADE says what was done.

Tile layout: one program for BLOCK_M rows and BLOCK_N outputs, in steps of BLOCK_K inputs. Programs
with the same outputs follow each other, so that a tile of M comes from memory once and then from
the second-level cache. A tile without running rows returns at once. One in which every running row
wants NARROW is made of bfloat16; in any other the rows that want NARROW are made EXACT. What
follows the product goes SUMS_COLUMNS outputs at a time, to need few registers. A wider tile of the
product therefore lies where ``value`` will be until its columns have their turn.

Bytes per call: ``4 n^2`` (NARROW: ``2 n^2``) of M for every row of tiles, from memory once;
``4 B n`` (``2 B n``) of points for every column of tiles; then per entry of (B, n) 4 for the offset
(NARROW: pre), 4 for the point, 4 for the slope of an adjoint, written 4 for the value, 4 each for
pre and g where they are kept, and another 8 with a tile wider than SUMS_COLUMNS, which caches
should hold. Operations: ``2 B n^2``, and some 50 per entry for phi.

Precision of an EXACT product: "ieee" is float32 throughout, by fused multiply-adds. "tf32x3" splits
each factor into two numbers of 11 bits, which leaves 2^-21 of it at most, and adds three of their
four products in tensor cores, which leaves out 2^-22. So a term is off by at most 2^-19 = 2e-6 of
itself, where a fused multiply-add has none. Sums are float32 in both, but tensor cores may truncate
where arithmetic rounds. By its data sheet the tensor cores of an H100 have 7 times the throughput
of its float32 arithmetic, so that three products cost less than one.

Tiles: see tile_choice.py. Which one is best is found on the first call with a size, by Triton's
autotuner, which keeps it on disk. Measuring repeats the launch. A launch reads no output but
``pre``, to which NARROW ones add, and measures on a copy of that; so the launch after it finds what
it needs, and writes all outputs again.

With few samples and n below about 4000 there are fewer programs than multiprocessors: sums over K
are not split. Compared with float64 by Triton's interpreter on a CPU, which has "ieee" products
only; compiled for sm_80 and sm_90. No GPU has run it: tile sizes are choices, not measurements.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine_tile import INTERPRETED, SUMS_COLUMNS, check_strides, finish, multiply, sums_of
from .sample import NARROW, STOPPED, WANTED, Samples
from .tile_choice import Tile, default_precision, default_tile, tuner

__all__ = ["Tile", "affine_step", "affine_step_kernel", "default_precision", "sums_of"]


@triton.jit(do_not_specialize=["batch_bucket"])
def affine_step_kernel(
    point_ptr,
    weight_ptr,
    change_ptr,
    narrow_ptr,
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
    narrow_stride_output,
    narrow_stride_input,
    value_stride,
    g_stride,
    flags_stride,
    batch_bucket,  # for the autotuner
    ACTIVATION: tl.constexpr,
    AT_ZERO: tl.constexpr,
    SLOPE_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NARROW_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = tl.load(flags_ptr + row * flags_stride + WANTED, mask=row < batch, other=STOPPED)
    if tl.max(wanted, axis=0) == STOPPED:
        return
    used = wanted != STOPPED
    RAMP: tl.constexpr = change_ptr is not None and not AT_ZERO
    narrow = tl.min(tl.where(used & (wanted != NARROW), 0, 1), axis=0) != 0
    if not RAMP:
        narrow = narrow & (size < 0)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Nested: the compiler knows the first condition.
    if RAMP:  # noqa: SIM102
        if narrow:
            product = multiply(
                change_ptr,
                narrow_ptr,
                used,
                column,
                size,
                narrow_stride_output,
                narrow_stride_input,
                "ieee",
                BLOCK_M,
                BLOCK_N,
                NARROW_K,
            )
    if not AT_ZERO:  # noqa: SIM102
        if not narrow:
            product = multiply(
                point_ptr,
                weight_ptr,
                used,
                column,
                size,
                weight_stride_output,
                weight_stride_input,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
    first_column = tl.program_id(1) * BLOCK_N
    if BLOCK_N == SUMS_COLUMNS:
        finish(
            product,
            narrow,
            wanted,
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
            ACTIVATION,
            AT_ZERO,
            SLOPE_ONLY,
            RAMP,
            BLOCK_M,
        )
    else:
        row = tl.arange(0, BLOCK_M)[:, None]
        tile_ptr = value_ptr + tl.program_id(0).to(tl.int64) * BLOCK_M * value_stride
        mask = used[:, None] & (column < size)[None, :]
        tl.store(tile_ptr + row * value_stride + column[None, :], product, mask=mask)
        tl.debug_barrier()
        last_column = tl.minimum(first_column + BLOCK_N, size)
        for at in tl.range(first_column, last_column, SUMS_COLUMNS, num_stages=1):
            part = at + tl.arange(0, SUMS_COLUMNS)
            there = used[:, None] & (part < size)[None, :]
            finish(
                tl.load(tile_ptr + row * value_stride + part[None, :], mask=there, other=0.0),
                narrow,
                wanted,
                at,
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
                ACTIVATION,
                AT_ZERO,
                SLOPE_ONLY,
                RAMP,
                BLOCK_M,
            )


_tuners = {aligned: tuner(affine_step_kernel, aligned) for aligned in (True, False)}
_measured: dict[tuple, triton.Config] = {}
_measuring = threading.Lock()  # a backward pass has a thread for each GPU


def affine_step(
    samples: Samples,
    weight: Tensor,
    narrow_weight: Tensor | None,
    point: Tensor,
    value: Tensor,
    residual: Tensor | None = None,
    activation: int | None = None,
    at_zero: bool = False,
    *,
    slope_only: bool = False,
    precision: str | None = None,
    tile: Tile | None = None,
) -> None:
    """Evaluates the rows of ``point`` ``(B, n)`` that ``samples.flags`` want evaluated.

    ``weight`` is M of ``point @ M.T``, float32 with any strides, ``narrow_weight`` the same in
    bfloat16 where narrow evaluations are possible (then ``samples`` has ``pre`` and ``change``).
    ``activation`` is an index of ``activations.INDEX``, or None for ``samples.slope * pre``. Writes
    ``value`` ``(B, n)``, ``residual`` ``(B, n)`` (both may be slots of a history: the last stride
    is 1), and what else ``samples`` has: see above. ``at_zero`` says that the point is zero: it is
    not read, and there is no product. With ``slope_only`` nothing is written but ``phi'(pre)``, to
    the rows of ``value`` that want an exact evaluation.

    Without a ``tile`` the first call with a size measures which one is best, except under the
    interpreter and while a CUDA graph is captured.
    """
    batch, size = point.shape
    if batch == 0 or size == 0:
        return
    check_strides(*weight.stride(), value.stride(0))
    change = None if narrow_weight is None or slope_only else samples.change
    matrices = [weight] if change is None else [weight, narrow_weight]
    aligned = size % 16 == 0 and all(
        1 in m.stride() and max(m.stride()) % 16 == 0 for m in matrices
    )
    precision = precision or default_precision(point)
    bucket = triton.next_power_of_2(batch)

    def grid(blocks: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(batch, blocks["BLOCK_M"]), triton.cdiv(size, blocks["BLOCK_N"])

    def launch(kernel: Any, pre: Tensor | None, **options: object) -> None:
        kernel[grid](
            point,
            weight,
            change,
            None if change is None else narrow_weight,
            samples.offset,
            samples.slope if activation is None else None,
            value,
            residual,
            pre,
            samples.sums,
            samples.flags,
            batch,
            size,
            sums_of(size),
            *weight.stride(),
            *((0, 0) if change is None else narrow_weight.stride()),
            value.stride(0),
            0 if residual is None else residual.stride(0),
            samples.flags.stride(0),
            bucket,
            ACTIVATION=-1 if activation is None else activation,
            AT_ZERO=at_zero,
            SLOPE_ONLY=slope_only,
            PRECISION=precision,
            enable_fp_fusion=True,
            **options,
        )

    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(point) if point.is_cuda else nullcontext():
        key = (size, bucket, precision, aligned, point.device)
        config = tile.config() if tile else _measured.get(key)
        if config is None:
            measures = point.is_cuda and not (at_zero or slope_only or INTERPRETED.value)
            if measures and not torch.cuda.is_current_stream_capturing():
                with _measuring:
                    tuned = _tuners[aligned]
                    launch(tuned, None if samples.pre is None else samples.pre.clone())
                    config = _measured[key] = tuned.best_config
            else:
                config = default_tile(batch, size, aligned, precision).config()
        launch(affine_step_kernel, samples.pre, **config.all_kwargs())
