"""Anderson steps of a tile of samples, for whole_kernel.py: history, Gram matrices, small solve.

Symbols: M samples of the tile, n their size padded to a power of two, w the window, w + 1 slots of
history; g = f(z) - z; k the newest entry and i = 1 ... w the older ones, newest first; c of them
are in use; beta the damping.

    ``gamma = argmin |g_k - sum gamma_i dg_i|^2 + ridge``, ``dg_i = g_k - g_i``
    ``z = f_k - sum gamma_i df_i - (1 - beta) (g_k - sum gamma_i dg_i)``

A program has a scratch of its own: f and g (w + 1, M, n) float32; Gram matrices (w + 1, w + 1, M)
float64, in whose row i are the products with the entries older than i; weights (w, M) float32;
notes (2, M) int32, counts and outcomes. What a part writes the next one reads behind a barrier. By
way of memory each part has the tile layout that suits it, whatever that of the product is.

1. Row: products in float64, because the differences of the Gram matrix cancel. Tiles are (M,
   entries, CHUNK); the sums are reduced once, after the loop over n.
2. Solve: an entry of the matrix is a vector (M,), and the elimination is unrolled over them: a
   thread has all that it needs of its sample and waits for no other. L D L^T row by row, newest
   first: its pivots are those of the Gauss-Jordan elimination of fastdeq/reference.py, and it drops
   the same columns. They are not scaled to unit norm; ridge and pivots are relative to |dg_i|^2.
3. Mixing: tiles (M, n); of the history only entries with a nonzero weight are loaded.

Bytes per sample and step: ``8 n`` written, ``4 n (c + 1)`` of g and ``4 n (c + 1)`` of f read (with
beta < 1 g again), ``4 c^2`` of the Gram matrix. Operations: ``2 n (c + 1)`` and ``w^3 / 3`` in
float64, the latter once in each warp; ``3 c n`` in float32.

Compared with fastdeq/reference.py by Triton's interpreter; compiled for sm_80 and sm_90. No GPU has
run it: the layouts are choices, not measurements.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Notes of a sample.
DROPPED = tl.constexpr(1)
REJECTED = tl.constexpr(2)
TAKEN_BACK = tl.constexpr(-1)  # in the place of a count


@triton.jit
def slot_of(slot, age, SLOTS: tl.constexpr):
    older = slot - age
    return tl.where(older < 0, older + SLOTS, older)


@triton.jit
def extend_gram(
    g_history,
    gram,
    counts,
    slot,
    size,
    WINDOW: tl.constexpr,
    OLDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Row ``slot``: products of the newest residual with itself and the older ones in use."""
    SLOTS: tl.constexpr = WINDOW + 1
    TILE: tl.constexpr = BLOCK_M * SIZE
    row = tl.arange(0, BLOCK_M)
    age = tl.arange(0, OLDER)
    exists = age < SLOTS
    entry = slot_of(slot, tl.where(exists, age, 0), SLOTS)
    used = (age[None, :] <= tl.load(counts + row)[:, None]) | (age == 0)[None, :]
    row_sum = tl.zeros((BLOCK_M, OLDER, CHUNK), tl.float64)
    place = row[:, None, None] * SIZE + tl.arange(0, CHUNK)[None, None, :]
    new_at = g_history + slot * TILE + place + tl.zeros((1, OLDER, 1), tl.int32)
    old_at = g_history + place + (entry * TILE)[None, :, None]
    for start in range(0, size, CHUNK):
        new = tl.load(new_at + start).to(tl.float64)
        old = tl.load(old_at + start, mask=used[:, :, None], other=0.0).to(tl.float64)
        row_sum += old * new
    at = (slot * SLOTS + entry)[None, :] * BLOCK_M + row[:, None]
    tl.store(gram + at, tl.sum(row_sum, axis=2), mask=used & exists[None, :])


@triton.jit
def small_solve(
    gram,
    counts,
    weights,
    outcomes,
    slot,
    ridge,
    rank_tolerance,
    max_weight,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Writes the weights, newest first, (WINDOW, M) float32, and DROPPED + REJECTED."""
    SLOTS: tl.constexpr = WINDOW + 1
    row = tl.arange(0, BLOCK_M)
    gram += row
    count = tl.load(counts + row)
    newest = tl.load(gram + slot * ((SLOTS + 1) * BLOCK_M))
    dropped = count < -1
    for i in tl.static_range(WINDOW):
        valid = count > i
        at_i = slot_of(slot, i + 1, SLOTS)
        own = tl.load(gram + at_i * ((SLOTS + 1) * BLOCK_M), mask=valid, other=0.0)
        with_newest = tl.load(gram + (slot * SLOTS + at_i) * BLOCK_M, mask=valid, other=0.0)
        square = newest - 2 * with_newest + own
        usable = valid & (square > 0) & (square < float("inf"))
        square = tl.where(usable, square, 0.0)
        left_i = tl.where(usable, newest - with_newest, 0.0)
        pivot = square + ridge * square
        y_i = left_i
        if i > 0:
            for j in tl.static_range(i):
                at_j = slot_of(slot, j + 1, SLOTS)
                pair = tl.load(gram + (at_j * SLOTS + at_i) * BLOCK_M, mask=valid, other=0.0)
                entry = tl.where(usable, left[j] - with_newest + pair, 0.0)
                for h in tl.static_range(j):
                    entry -= above[h] * lower[j * (j - 1) // 2 + h]
                if j == 0:
                    above = (entry,)
                else:
                    above = above + (entry,)
            for j in tl.static_range(i):
                factor = above[j] * inverse[j]
                pivot -= above[j] * factor
                y_i -= factor * y[j]
                if i == 1:
                    lower = (factor,)
                else:
                    lower = lower + (factor,)
        kept = usable & (pivot > rank_tolerance * square)
        dropped = dropped | (valid & (kept == 0))
        # A column that is dropped has factors of 0 in all that follows.
        inverse_i = tl.where(kept, 1 / tl.where(kept, pivot, 1.0), 0.0)
        if i == 0:
            left = (left_i,)
            inverse = (inverse_i,)
            y = (y_i,)
        else:
            left = left + (left_i,)
            inverse = inverse + (inverse_i,)
            y = y + (y_i,)
    total = tl.zeros((BLOCK_M,), tl.float64)
    for step in tl.static_range(WINDOW):
        x = y[WINDOW - 1 - step] * inverse[WINDOW - 1 - step]
        for later in tl.static_range(step):
            x -= (
                lower[(WINDOW - 1 - later) * (WINDOW - 2 - later) // 2 + WINDOW - 1 - step]
                * solution[later]
            )
        x = tl.where(inverse[WINDOW - 1 - step] == 0, 0.0, x)
        total += tl.abs(x)
        if step == 0:
            solution = (x,)
        else:
            solution = solution + (x,)
    rejected = (total <= max_weight) == 0  # a NaN sum is rejected
    for i in tl.static_range(WINDOW):
        weight = tl.where(rejected, 0.0, solution[WINDOW - 1 - i]).to(tl.float32)
        tl.store(weights + i * BLOCK_M + row, weight)
    tl.store(outcomes + row, tl.where(dropped, DROPPED, 0) + tl.where(rejected, REJECTED, 0))


@triton.jit
def mix(
    f_history,
    g_history,
    counts,
    weights,
    slot,
    undamped,
    DAMPED: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The next points (M, n): mixed, or the last value that is trusted."""
    SLOTS: tl.constexpr = WINDOW + 1
    TILE: tl.constexpr = BLOCK_M * SIZE
    row = tl.arange(0, BLOCK_M)
    place = row[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    f_new = tl.load(f_history + slot * TILE + place)
    z = f_new
    if DAMPED:
        g_new = tl.load(g_history + slot * TILE + place)
        z = f_new - undamped * g_new
    for i in tl.static_range(WINDOW):
        weight = tl.load(weights + i * BLOCK_M + row)[:, None]
        used = weight != 0
        at = slot_of(slot, i + 1, SLOTS) * TILE + place
        difference = f_new - tl.load(f_history + at, mask=used, other=0.0)
        if DAMPED:
            difference -= undamped * (g_new - tl.load(g_history + at, mask=used, other=0.0))
        # An unused slot may hold anything: 0 * NaN must not enter.
        z -= tl.where(used, weight * difference, 0.0)
    back = (tl.load(counts + row) == TAKEN_BACK)[:, None]
    trusted = tl.load(f_history + slot_of(slot, 1, SLOTS) * TILE + place, mask=back, other=0.0)
    return tl.where(back, trusted, z)


@triton.jit
def anderson_step(
    f_history,
    g_history,
    gram,
    weights,
    notes,
    slot,
    size,
    value,
    point,
    count,
    back,
    undamped,
    ridge,
    rank_tolerance,
    max_weight,
    DAMPED: tl.constexpr,
    WINDOW: tl.constexpr,
    OLDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The next points (M, n), and of each sample DROPPED + REJECTED."""
    row = tl.arange(0, BLOCK_M)
    place = slot * (BLOCK_M * SIZE) + row[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    outcomes = notes + BLOCK_M
    tl.debug_barrier()  # the step before has been read
    tl.store(f_history + place, value)
    tl.store(g_history + place, value - point)
    tl.store(notes + row, tl.where(back, TAKEN_BACK, count))
    tl.debug_barrier()
    extend_gram(g_history, gram, notes, slot, size, WINDOW, OLDER, BLOCK_M, SIZE, CHUNK)
    tl.debug_barrier()
    small_solve(
        gram,
        notes,
        weights,
        outcomes,
        slot,
        ridge,
        rank_tolerance,
        max_weight,
        WINDOW,
        BLOCK_M,
    )
    tl.debug_barrier()
    following = mix(
        f_history, g_history, notes, weights, slot, undamped, DAMPED, WINDOW, BLOCK_M, SIZE
    )
    return following, tl.load(outcomes + row)
