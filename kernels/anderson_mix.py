"""Anderson mix in Triton: a row of the Gram matrix, the small solve and the mixing in one launch.

Symbols: B samples of size n; m slots of history, k the newest; p = m - 1 older entries and P the
next power of two; s bytes per element; g = f(z) - z the residual of an iterate z; beta the damping;
``dg_i = g_k - g_i`` and ``df_i = f_k - f_i``.

    ``gamma = argmin |g_k - sum gamma_i dg_i|^2 + ridge``, on columns of unit norm
    ``z = f_k - sum gamma_i df_i - (1 - beta) (g_k - sum gamma_i dg_i)``

Tile layout: one program per sample. Tiles are (P, BLOCK) with the older entries as rows, newest
first, and run over n; the newest entry is a row of its own, so that m = 2^i + 1 wastes nothing.
The small system is a (P, P) float64 tile in registers.
1. Row: products and sums in float64, because the differences of the Gram matrix cancel. The sums
   stay spread over the tile and are reduced once, after the loop.
2. Solve: Gauss-Jordan, newest column first. Triton cannot index a register tile, so row and column
   j are selected and summed; a NaN in the rest of the tile does not enter such a sum.
3. Mixing: only entries with a nonzero weight are loaded.

Bytes per sample: at most ``2 m n s`` read (g, then f), ``n s`` to read g_k again and ``n s``
written; with beta < 1 another ``p n s``, g in step 3. What step 3 reads of g is often still in a
cache. The Gram matrix adds ``8 (p^2 + p)`` read and ``8 (2 m - 1)`` written.

Operations per sample: ``2 m n`` in float64 for the row; ``3 p n`` (``6 p n`` with beta < 1) in the
dtype of f for the mixing; about ``4 p P^2`` in float64 for the solve. For m = 6 in float32 the row
adds 0.2 float64 operations to each byte moved, so memory traffic should set the time once there are
enough samples to fill the GPU. With few samples of large n most of it idles: a sample is not split.

Compared with fastdeq/reference.py, anderson_mix, by Triton's interpreter on a CPU; compiled for
sm_80 and sm_90. No GPU has run it yet: tile sizes and warp counts are choices, not measurements.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# A (64, 64) float64 tile is the most that 16 warps hold without spilling, for a contiguous history.
MAX_SLOTS = 65


@triton.jit
def gram_row(
    newest_g, older_g, used, size, stride_entry, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """The row <g_k, g_i> (COLUMNS,) of the entries ``used`` and the diagonal <g_k, g_k>."""
    square_sum = tl.zeros((BLOCK,), tl.float64)
    row_sum = tl.zeros((COLUMNS, BLOCK), tl.float64)
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = entry < size
        offset = entry * stride_entry
        new = tl.load(newest_g + offset, mask=inside, other=0.0).to(tl.float64)
        old_mask = used[:, None] & inside[None, :]
        old = tl.load(older_g + offset[None, :], mask=old_mask, other=0.0).to(tl.float64)
        square_sum += new * new
        row_sum += old * new[None, :]
    return tl.sum(row_sum, axis=1), tl.sum(square_sum, axis=0)


@triton.jit
def solve_small(
    pairs, own, row, diagonal, column, valid, regularization, rank_tolerance, max_weight
):
    """gamma (COLUMNS,), newest first, of the first ``valid`` columns, with <g_i, g_j> in ``pairs``
    and its diagonal in ``own``; the number of columns kept; whether the weights are accepted."""
    # <dg_i, dg_j> gamma = <dg_i, g_k>. Zeros come by selection, not by product: 0 * NaN is NaN.
    square = diagonal - 2 * row + own
    kept = (column < valid) & (square > 0) & (square < float("inf"))
    scale = tl.where(kept, 1 / tl.sqrt(tl.where(kept, square, 1.0)), 0.0)
    rhs = tl.where(kept, (diagonal - row) * scale, 0.0)
    matrix = (diagonal - row)[:, None] - row[None, :] + pairs
    matrix = matrix * scale[:, None] * scale[None, :]
    on_diagonal = column[:, None] == column[None, :]
    matrix = tl.where(on_diagonal, matrix + regularization, matrix)
    # A column that is not used has pivot 0, which no tolerance >= 0 keeps.
    matrix = tl.where(kept[:, None] & kept[None, :], matrix, 0.0)
    for j in range(valid):
        at_j = column == j
        matrix_column = tl.sum(tl.where(at_j[None, :], matrix, 0.0), axis=1)
        matrix_row = tl.sum(tl.where(at_j[:, None], matrix, 0.0), axis=0)
        pivot = tl.broadcast_to(tl.sum(tl.where(at_j, matrix_column, 0.0), axis=0), column.shape)
        rhs_j = tl.sum(tl.where(at_j, rhs, 0.0), axis=0)
        keep = pivot > rank_tolerance
        kept = kept & (keep | (column != j))
        eliminate = keep & (column != j)
        factor = tl.where(eliminate, matrix_column / tl.where(keep, pivot, 1.0), 0.0)
        change = factor[:, None] * matrix_row[None, :]
        matrix = tl.where(eliminate[:, None], matrix - change, matrix)
        rhs = tl.where(eliminate, rhs - factor * rhs_j, rhs)
    pivots = tl.sum(tl.where(on_diagonal, matrix, 0.0), axis=1)
    gamma = tl.where(kept, rhs / tl.where(kept, pivots, 1.0) * scale, 0.0)
    accepted = tl.sum(tl.abs(gamma), axis=0) <= max_weight  # a NaN sum is not accepted
    return gamma, tl.sum(kept.to(tl.int32), axis=0), accepted


# The slot changes from call to call: specialising on its value would compile the kernel anew. The
# options are annotated because a plain Python float arrives as float32.
@triton.jit(do_not_specialize=["slot"])
def anderson_mix_kernel(
    f_ptr,
    g_ptr,
    gram_ptr,
    count_ptr,
    z_ptr,
    dropped_ptr,
    rejected_ptr,
    slots,
    size,
    slot,
    undamped: tl.float64,  # 1 - beta
    regularization: tl.float64,
    rank_tolerance: tl.float64,
    max_weight: tl.float64,
    f_stride_batch,
    f_stride_slot,
    f_stride_entry,
    g_stride_batch,
    g_stride_slot,
    g_stride_entry,
    gram_stride_batch,
    gram_stride_row,
    gram_stride_column,
    count_stride,
    DAMPED: tl.constexpr,
    COLUMNS: tl.constexpr,  # P
    BLOCK: tl.constexpr,
):
    # 64-bit offsets: a history may well have more than 2^31 elements.
    sample = tl.program_id(0).to(tl.int64)
    f_ptr += sample * f_stride_batch
    g_ptr += sample * g_stride_batch
    gram_ptr += sample * gram_stride_batch
    newest = slot.to(tl.int64)
    column = tl.arange(0, COLUMNS)
    exists = column < slots - 1
    older = newest - 1 - column
    older = tl.where(older < 0, older + slots, older)
    older_f = f_ptr + (older * f_stride_slot)[:, None]
    older_g = g_ptr + (older * g_stride_slot)[:, None]
    newest_f = f_ptr + newest * f_stride_slot
    newest_g = g_ptr + newest * g_stride_slot

    # Read before the long loop, which hides the wait. This call does not write these entries.
    pairs = tl.load(
        gram_ptr + older[:, None] * gram_stride_row + older[None, :] * gram_stride_column,
        mask=exists[:, None] & exists[None, :],
        other=0.0,
    )
    own = tl.load(gram_ptr + older * (gram_stride_row + gram_stride_column), mask=exists, other=0.0)
    valid = tl.load(count_ptr + sample * count_stride)
    valid = tl.maximum(tl.minimum(valid, slots - 1), 0)

    # 1. The row of the Gram matrix.
    row, diagonal = gram_row(newest_g, older_g, exists, size, g_stride_entry, COLUMNS, BLOCK)
    tl.store(gram_ptr + newest * (gram_stride_row + gram_stride_column), diagonal)
    row_ptr = gram_ptr + newest * gram_stride_row + older * gram_stride_column
    column_ptr = gram_ptr + older * gram_stride_row + newest * gram_stride_column
    tl.store(row_ptr, row, mask=exists)
    tl.store(column_ptr, row, mask=exists)

    # 2. The small solve.
    gamma, kept, accepted = solve_small(
        pairs, own, row, diagonal, column, valid, regularization, rank_tolerance, max_weight
    )
    tl.store(dropped_ptr + sample, valid - kept)
    tl.store(rejected_ptr + sample, accepted == 0)

    # 3. The mixing, in the dtype of f. An unused slot may hold anything: it is not even loaded.
    dtype = z_ptr.dtype.element_ty
    weight = tl.where(accepted, gamma, 0.0).to(dtype)[:, None]
    used = weight != 0
    rest = tl.full((1,), undamped, dtype)
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = entry < size
        f_offset = entry * f_stride_entry
        g_offset = entry * g_stride_entry
        old_mask = used & inside[None, :]
        f_new = tl.load(newest_f + f_offset, mask=inside, other=0.0)
        # Read for beta = 1 as well: 0 * g_k carries a NaN or an infinity of g_k over to z.
        g_new = tl.load(newest_g + g_offset, mask=inside, other=0.0)
        f_old = tl.load(older_f + f_offset[None, :], mask=old_mask, other=0.0)
        difference = f_new[None, :] - f_old
        if DAMPED:
            g_old = tl.load(older_g + g_offset[None, :], mask=old_mask, other=0.0)
            difference -= rest[None, :] * (g_new[None, :] - g_old)
        change = tl.sum(tl.where(used, weight * difference, 0.0), axis=0)
        z = f_new - rest * g_new - change
        tl.store(z_ptr + sample * size + entry, z, mask=inside)


def tile_shape(slots: int, size: int) -> tuple[int, int, int]:
    """(COLUMNS, BLOCK, number of warps) for m slots and size n.

    About 8 elements of a tile to a thread: that leaves the registers for 4 programs on a
    multiprocessor, so that one can wait in its solve while others load.
    """
    columns = max(1, triton.next_power_of_2(slots - 1))
    warps = 4 if columns <= 8 else 8 if columns <= 32 else 16
    block = min(1024, 256 * warps // columns, triton.next_power_of_2(size))
    return columns, max(32, block), warps


def anderson_mix(
    f_history: Tensor,
    g_history: Tensor,
    gram: Tensor,
    count: Tensor,
    slot: int,
    damping: float,
    regularization: float,
    rank_tolerance: float,
    max_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Anderson acceleration for each sample: see ``fastdeq.reference.anderson_mix``.

    Takes any strides and at most ``MAX_SLOTS`` slots. Raises RuntimeError for shapes, dtypes and
    devices it cannot take, as the compiled forms do.
    """
    _check(f_history, g_history, gram, count, slot)
    batch, slots, size = f_history.shape
    z = f_history.new_empty(batch, size)
    dropped = count.new_empty(batch)
    rejected = count.new_empty(batch, dtype=torch.bool)
    if batch == 0:
        return z, dropped, rejected
    columns, block, warps = tile_shape(slots, size)
    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(f_history) if f_history.is_cuda else nullcontext():
        anderson_mix_kernel[(batch,)](
            f_history,
            g_history,
            gram,
            count,
            z,
            dropped,
            rejected,
            slots,
            size,
            slot,
            1.0 - damping,
            float(regularization),
            float(rank_tolerance),
            float(max_weight),
            *f_history.stride(),
            *g_history.stride(),
            *gram.stride(),
            count.stride(0),
            DAMPED=damping != 1.0,
            COLUMNS=columns,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return z, dropped, rejected


def _check(f_history: Tensor, g_history: Tensor, gram: Tensor, count: Tensor, slot: int) -> None:
    """The checks of csrc/anderson_check.h, and the limit of this form."""
    if f_history.dim() != 3 or f_history.shape != g_history.shape:
        raise RuntimeError(
            "anderson_mix: f_history and g_history must both be (B, m, n), got "
            f"{list(f_history.shape)} and {list(g_history.shape)}"
        )
    batch, slots, _size = f_history.shape
    if gram.shape != (batch, slots, slots) or gram.dtype != torch.float64:
        raise RuntimeError(
            f"anderson_mix: gram must be float64 ({batch}, {slots}, {slots}), got "
            f"{gram.dtype} {list(gram.shape)}"
        )
    if count.shape != (batch,) or count.dtype != torch.int32:
        raise RuntimeError(
            f"anderson_mix: count must be int32 ({batch},), got {count.dtype} {list(count.shape)}"
        )
    if f_history.dtype != g_history.dtype:
        raise RuntimeError("anderson_mix: f_history and g_history differ in dtype")
    if f_history.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(
            f"anderson_mix: the history must be float32 or float64, got {f_history.dtype}"
        )
    if len({t.device for t in (f_history, g_history, gram, count)}) != 1:
        raise RuntimeError("anderson_mix: the tensors are on different devices")
    if not 0 <= slot < slots:
        raise RuntimeError(f"anderson_mix: slot {slot} is not in [0, {slots})")
    if slots > MAX_SLOTS:
        raise RuntimeError(
            f"anderson_mix: the Triton form takes at most {MAX_SLOTS} slots, got {slots}"
        )
