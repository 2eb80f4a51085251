"""The operator anderson_mix in Triton: Gram row, small solve and mixing in one launch.

Symbols: B samples of size n; m entries of history, k the newest; p = m - 1 older entries and P the
next power of two; s bytes per element; g = f(z) - z the residual of an iterate z; beta the damping;
``dg_i = g_k - g_i`` and ``df_i = f_k - f_i``.

    ``gamma = argmin |g_k - sum gamma_i dg_i|^2 + ridge``, on columns of unit norm
    ``z = f_k - sum gamma_i df_i - (1 - beta) (g_k - sum gamma_i dg_i)``

Tile layout: one program per sample. Tiles are (P, BLOCK) with the older entries as rows, newest
first, and run over n. Row and solve: anderson_weights.py. Mixing: only entries with a nonzero
weight are loaded.

Bytes per sample: at most ``2 m n s`` read (g, then f), ``n s`` to read g_k again and ``n s``
written; with beta < 1 another ``p n s``, g in the mixing. What that reads of g is often still in a
cache. The Gram matrix adds ``8 (p^2 + p)`` read and ``8 (2 m - 1)`` written.

Operations per sample: ``2 m n`` in float64 for the row; ``3 p n`` (``6 p n`` with beta < 1) in the
dtype of f for the mixing; about ``4 p P^2`` in float64 for the solve. For m = 6 in float32 the row
adds 0.2 float64 operations to each byte moved, so memory traffic should set the time once there are
enough samples to fill the GPU. With few samples of large n most of it idles: a sample is not split.

Compared with the reference by Triton's interpreter on a CPU; compiled for sm_80 and sm_90. Tile
sizes and warp counts are choices, not measurements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .anderson_weights import mixing_weights, older_entries
from .launch import on_device

# A (64, 64) float64 tile is the most that 16 warps hold without spilling, for a contiguous history.
MAX_CAPACITY = 65


# The place changes from call to call: specialising on its value would compile the kernel anew. The
# options are annotated because a plain Python float arrives as float32.
@triton.jit(do_not_specialize=["newest"])
def anderson_mix_kernel(
    f_ptr,
    g_ptr,
    gram_ptr,
    count_ptr,
    z_ptr,
    dropped_ptr,
    rejected_ptr,
    capacity,
    size,
    newest,
    undamped: tl.float64,  # 1 - beta
    regularization: tl.float64,
    rank_tolerance: tl.float64,
    max_weight: tl.float64,
    f_stride_batch,
    f_stride_place,
    f_stride_entry,
    g_stride_batch,
    g_stride_place,
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
    newest = newest.to(tl.int64)
    older = older_entries(newest, capacity, COLUMNS)
    exists = tl.arange(0, COLUMNS) < capacity - 1
    older_f = f_ptr + older * f_stride_place
    older_g = g_ptr + older * g_stride_place
    newest_f = f_ptr + newest * f_stride_place
    newest_g = g_ptr + newest * g_stride_place

    one = tl.arange(0, 1)  # the only sample of this program
    valid = tl.load(count_ptr + sample * count_stride + one)
    valid = tl.maximum(tl.minimum(valid, capacity - 1), 0)
    gamma, kept, accepted = mixing_weights(
        newest_g=newest_g + one,
        older_g=older_g[None, :],
        gram=gram_ptr + one,
        stride_row=gram_stride_row,
        stride_column=gram_stride_column,
        newest=newest,
        older=older,
        used=exists[None, :],
        valid=valid,
        size=size,
        stride_entry=g_stride_entry,
        regularization=regularization,
        rank_tolerance=rank_tolerance,
        max_weight=max_weight,
        BLOCK=BLOCK,
    )
    tl.store(dropped_ptr + sample + one, valid - kept)
    tl.store(rejected_ptr + sample + one, accepted == 0)

    # The mixing, in the dtype of f. An unused entry may hold anything: it is not even loaded.
    dtype = z_ptr.dtype.element_ty
    weight = tl.sum(gamma, axis=0).to(dtype)[:, None]
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
        f_old = tl.load(older_f[:, None] + f_offset[None, :], mask=old_mask, other=0.0)
        difference = f_new[None, :] - f_old
        if DAMPED:
            g_old = tl.load(older_g[:, None] + g_offset[None, :], mask=old_mask, other=0.0)
            difference -= rest[None, :] * (g_new[None, :] - g_old)
        change = tl.sum(tl.where(used, weight * difference, 0.0), axis=0)
        z = f_new - rest * g_new - change
        tl.store(z_ptr + sample * size + entry, z, mask=inside)


def tile_shape(capacity: int, size: int) -> tuple[int, int, int]:
    """(COLUMNS, BLOCK, number of warps) for m entries and size n.

    About 8 elements of a tile to a thread: that leaves the registers for 4 programs on a
    multiprocessor, so that one can wait in its solve while others load.
    """
    columns = max(1, triton.next_power_of_2(capacity - 1))
    warps = 4 if columns <= 8 else 8 if columns <= 32 else 16
    block = min(1024, 256 * warps // columns, triton.next_power_of_2(size))
    return columns, max(32, block), warps


def anderson_mix(
    f_history: Tensor,
    g_history: Tensor,
    gram: Tensor,
    count: Tensor,
    newest: int,
    damping: float,
    regularization: float,
    rank_tolerance: float,
    max_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Anderson acceleration for each sample: see fastdeq/ops/anderson_mix.py.

    Takes any strides and at most ``MAX_CAPACITY`` entries. Raises RuntimeError for shapes, dtypes
    and devices it cannot take, as C++ does.
    """
    _check(f_history, g_history, gram, count, newest)
    batch, capacity, size = f_history.shape
    z = f_history.new_empty(batch, size)
    dropped = count.new_empty(batch)
    rejected = count.new_empty(batch, dtype=torch.bool)
    if batch == 0:
        return z, dropped, rejected
    columns, block, warps = tile_shape(capacity, size)
    with on_device(f_history):
        anderson_mix_kernel[(batch,)](
            f_ptr=f_history,
            g_ptr=g_history,
            gram_ptr=gram,
            count_ptr=count,
            z_ptr=z,
            dropped_ptr=dropped,
            rejected_ptr=rejected,
            capacity=capacity,
            size=size,
            newest=newest,
            undamped=1.0 - damping,
            regularization=float(regularization),
            rank_tolerance=float(rank_tolerance),
            max_weight=float(max_weight),
            **_strides("f", f_history, ("batch", "place", "entry")),
            **_strides("g", g_history, ("batch", "place", "entry")),
            **_strides("gram", gram, ("batch", "row", "column")),
            count_stride=count.stride(0),
            DAMPED=damping != 1.0,
            COLUMNS=columns,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return z, dropped, rejected


def _strides(name: str, t: Tensor, dimensions: tuple[str, ...]) -> dict[str, int]:
    return {f"{name}_stride_{d}": s for d, s in zip(dimensions, t.stride(), strict=True)}


def _check(f_history: Tensor, g_history: Tensor, gram: Tensor, count: Tensor, newest: int) -> None:
    """The checks of the C++ implementation, and the limit of this implementation."""
    if f_history.dim() != 3 or f_history.shape != g_history.shape:
        raise RuntimeError(
            "anderson_mix: f_history and g_history must both be (B, m, n), got "
            f"{list(f_history.shape)} and {list(g_history.shape)}"
        )
    batch, capacity, _size = f_history.shape
    if gram.shape != (batch, capacity, capacity) or gram.dtype != torch.float64:
        raise RuntimeError(
            f"anderson_mix: gram must be float64 ({batch}, {capacity}, {capacity}), got "
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
    if not 0 <= newest < capacity:
        raise RuntimeError(f"anderson_mix: newest {newest} is not in [0, {capacity})")
    if capacity > MAX_CAPACITY:
        raise RuntimeError(
            f"anderson_mix: the Triton kernel takes at most {MAX_CAPACITY} entries, got {capacity}"
        )
