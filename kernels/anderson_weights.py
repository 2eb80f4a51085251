"""The weights of Anderson acceleration: a row of the Gram matrix and the small solve.

Symbols: M samples of a program, often 1; m entries of history, k the newest; p = m - 1 older ones,
newest first, and P the next power of two; g = f(z) - z the residual of an iterate z;
``dg_i = g_k - g_i``.

    ``gamma = argmin |g_k - sum gamma_i dg_i|^2 + ridge``, on columns of unit norm

Tile layout: (M, P, BLOCK) of the history, which runs over n, and (M, P, P) of the small systems, in
registers. The newest entry is a row of its own, so that m = 2^i + 1 wastes nothing.
1. Row: products and sums in float64, because the differences of the Gram matrix cancel. The sums
   stay spread over the tile and are reduced once, after the loop.
2. Solve: Gauss-Jordan, newest column first. Triton cannot index a register tile, so row and column
   j are selected and summed; a NaN in the rest of the tile does not enter such a sum, nor does one
   of another sample.

Bytes per sample, c entries in use: a pass over c + 1 rows of g, ``8 (c^2 + c)`` read and
``8 (2 c + 1)`` written of the Gram matrix. Operations in float64: ``2 (c + 1) n`` for the row,
about ``4 c P^2`` for the solve.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gram_row(newest_g, older_g, used, size, stride_entry, BLOCK: tl.constexpr):
    """<g_k, g_i> (M, P) of the entries ``used`` and <g_k, g_k> (M,); of pointers to the rows."""
    square_sum = tl.zeros((used.shape[0], BLOCK), tl.float64)
    row_sum = tl.zeros((used.shape[0], used.shape[1], BLOCK), tl.float64)
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = (entry < size)[None, :]
        offset = (entry * stride_entry)[None, :]
        new = tl.load(newest_g[:, None] + offset, mask=inside, other=0.0).to(tl.float64)
        old_mask = used[:, :, None] & inside[None, :, :]
        old = tl.load(older_g[:, :, None] + offset[None, :, :], mask=old_mask, other=0.0)
        square_sum += new * new
        row_sum += old.to(tl.float64) * new[:, None, :]
    return tl.sum(row_sum, axis=2), tl.sum(square_sum, axis=1)


@triton.jit
def solve_small(
    pairs, own, row, diagonal, column, valid, regularization, rank_tolerance, max_weight
):
    """gamma (M, P) of the first ``valid`` (M,) columns, with <g_i, g_j> in ``pairs`` (M, P, P) and
    its diagonal in ``own``; the number of columns kept; whether the weights are accepted."""
    # <dg_i, dg_j> gamma = <dg_i, g_k>. Zeros come by selection, not by product: 0 * NaN is NaN.
    square = diagonal[:, None] - 2 * row + own
    kept = (column[None, :] < valid[:, None]) & (square > 0) & (square < float("inf"))
    scale = tl.where(kept, 1 / tl.sqrt(tl.where(kept, square, 1.0)), 0.0)
    with_newest = diagonal[:, None] - row
    rhs = tl.where(kept, with_newest * scale, 0.0)
    matrix = with_newest[:, :, None] - row[:, None, :] + pairs
    matrix = matrix * scale[:, :, None] * scale[:, None, :]
    on_diagonal = (column[:, None] == column[None, :])[None, :, :]
    matrix = tl.where(on_diagonal, matrix + regularization, matrix)
    # A column that is not used has pivot 0, which no tolerance >= 0 keeps.
    matrix = tl.where(kept[:, :, None] & kept[:, None, :], matrix, 0.0)
    for j in range(tl.max(valid, axis=0)):
        at_j = (column == j)[None, :]
        others = (column != j)[None, :]
        matrix_column = tl.sum(tl.where(at_j[:, None, :], matrix, 0.0), axis=2)
        matrix_row = tl.sum(tl.where(at_j[:, :, None], matrix, 0.0), axis=1)
        pivot = tl.sum(tl.where(at_j, matrix_column, 0.0), axis=1)
        pivot = tl.broadcast_to(pivot[:, None], rhs.shape)
        rhs_j = tl.sum(tl.where(at_j, rhs, 0.0), axis=1)
        keep = pivot > rank_tolerance
        kept = kept & (keep | others)
        eliminate = keep & others
        factor = tl.where(eliminate, matrix_column / tl.where(keep, pivot, 1.0), 0.0)
        change = factor[:, :, None] * matrix_row[:, None, :]
        matrix = tl.where(eliminate[:, :, None], matrix - change, matrix)
        rhs = tl.where(eliminate, rhs - factor * rhs_j[:, None], rhs)
    pivots = tl.sum(tl.where(on_diagonal, matrix, 0.0), axis=2)
    gamma = tl.where(kept, rhs / tl.where(kept, pivots, 1.0) * scale, 0.0)
    accepted = tl.sum(tl.abs(gamma), axis=1) <= max_weight  # a NaN sum is not accepted
    return gamma, tl.sum(kept.to(tl.int32), axis=1), accepted


@triton.jit
def mixing_weights(
    newest_g,  # (M,) and (M, P) pointers to rows of the history
    older_g,
    gram,  # (M,) pointers to the Gram matrices
    stride_row,
    stride_column,
    newest,  # the place of the newest entry, and (P,) those of the older ones
    older,
    used,  # (M, P): entries that are read, and whose products are stored
    valid,  # (M,): how many of the older ones count
    size,
    stride_entry,
    regularization,
    rank_tolerance,
    max_weight,
    BLOCK: tl.constexpr,
):
    """Extends the Gram matrices by a row. Returns the weights (M, P) float64, zero where they are
    rejected; the number of columns kept (M,); whether the weights are accepted."""
    # Read before the long loop, which hides the wait. This call does not write these entries.
    at = older[:, None] * stride_row + older[None, :] * stride_column
    both = used[:, :, None] & used[:, None, :]
    pairs = tl.load(gram[:, None, None] + at[None, :, :], mask=both, other=0.0)
    at = older * (stride_row + stride_column)
    own = tl.load(gram[:, None] + at[None, :], mask=used, other=0.0)
    row, diagonal = gram_row(newest_g, older_g, used, size, stride_entry, BLOCK)
    tl.store(gram + newest * (stride_row + stride_column), diagonal)
    at = newest * stride_row + older * stride_column
    tl.store(gram[:, None] + at[None, :], row, mask=used)
    at = older * stride_row + newest * stride_column
    tl.store(gram[:, None] + at[None, :], row, mask=used)
    gamma, kept, accepted = solve_small(
        pairs=pairs,
        own=own,
        row=row,
        diagonal=diagonal,
        column=tl.arange(0, older.shape[0]),
        valid=valid,
        regularization=regularization,
        rank_tolerance=rank_tolerance,
        max_weight=max_weight,
    )
    return tl.where(accepted[:, None], gamma, 0.0), kept, accepted


@triton.jit
def older_entries(newest, capacity, COLUMNS: tl.constexpr):
    """(P,): the places of the older entries, newest first."""
    older = newest - 1 - tl.arange(0, COLUMNS)
    return tl.where(older < 0, older + capacity, older)
