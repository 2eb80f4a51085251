"""Anderson steps of a tile of samples, for kernel.py: history, weights, mixing.

Symbols: M samples of the tile, n their size padded to a power of two, w the window, w + 1 entries
of history; g = f(z) - z; k the newest entry and i = 1 ... w the older ones, newest first; c of them
are in use; beta the damping.

    ``z = f_k - sum gamma_i df_i - (1 - beta) (g_k - sum gamma_i dg_i)``

A program has a scratch of its own: f and g (w + 1, M, n) float32; Gram matrices (M, w + 1, w + 1)
float64. What is written there is read behind a barrier, as each part has a tile layout of its own.
The weights are those of anderson_weights.py, for all samples at once, on tiles (M, P, CHUNK) and
(M, P, P), P the power of two that holds w. Mixing: tiles (M, n); of the history only entries with a
nonzero weight are loaded.

Bytes per sample and step: ``8 n`` written, ``4 n (c + 1)`` of g and ``4 n (c + 1)`` of f read (with
beta < 1 g again), ``8 c^2`` of the Gram matrix. Operations: ``2 n (c + 1)`` and ``4 c P^2`` in
float64, ``3 c n`` in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..anderson_weights import mixing_weights, older_entries


@triton.jit
def mix(
    f_history,
    g_history,
    place,  # (M, n): offsets within an entry
    weights,  # (M, P)
    back,
    newest,
    undamped,
    DAMPED: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The next points (M, n): mixed, or the last value that is trusted."""
    CAPACITY: tl.constexpr = WINDOW + 1
    TILE: tl.constexpr = place.shape[0] * place.shape[1]
    f_new = tl.load(f_history + newest * TILE + place)
    z = f_new
    if DAMPED:
        g_new = tl.load(g_history + newest * TILE + place)
        z = f_new - undamped * g_new
    column = tl.arange(0, weights.shape[1])[None, :]
    for i in range(WINDOW):
        weight = tl.sum(tl.where(column == i, weights, 0.0), axis=1)[:, None]
        used = weight != 0
        older = newest - 1 - i
        at = tl.where(older < 0, older + CAPACITY, older) * TILE + place
        difference = f_new - tl.load(f_history + at, mask=used, other=0.0)
        if DAMPED:
            difference -= undamped * (g_new - tl.load(g_history + at, mask=used, other=0.0))
        # An unused entry may hold anything: 0 * NaN must not enter.
        z -= tl.where(used, weight * difference, 0.0)
    before = tl.where(newest == 0, WINDOW, newest - 1) * TILE + place
    trusted = tl.load(f_history + before, mask=back[:, None], other=0.0)
    return tl.where(back[:, None], trusted, z)


@triton.jit
def anderson_step(
    f_history,
    g_history,
    gram,
    newest,
    size,
    value,
    point,
    count,
    back,
    refills,
    undamped,
    regularization,
    rank_tolerance,
    max_weight,
    DAMPED: tl.constexpr,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,  # P
    CHUNK: tl.constexpr,
):
    """The next points (M, n); of each sample, whether columns were dropped, and whether the weights
    were rejected. Samples to be taken ``back``, or that refill their history, have no weights."""
    CAPACITY: tl.constexpr = WINDOW + 1
    M: tl.constexpr = value.shape[0]
    SIZE: tl.constexpr = value.shape[1]
    row = tl.arange(0, M)
    place = row[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.debug_barrier()  # the step before has been read
    tl.store(f_history + newest * (M * SIZE) + place, value)
    tl.store(g_history + newest * (M * SIZE) + place, value - point)
    tl.debug_barrier()
    valid = tl.where(back, 0, count)
    older = older_entries(newest, CAPACITY, COLUMNS)
    g_rows = g_history + row * SIZE
    weights, kept, accepted = mixing_weights(
        newest_g=g_rows + newest * (M * SIZE),
        older_g=g_rows[:, None] + (older * (M * SIZE))[None, :],
        gram=gram + row * (CAPACITY * CAPACITY),
        stride_row=CAPACITY,
        stride_column=1,
        newest=newest,
        older=older,
        used=tl.arange(0, COLUMNS)[None, :] < valid[:, None],
        valid=valid,
        size=size,
        stride_entry=1,
        regularization=regularization,
        rank_tolerance=rank_tolerance,
        max_weight=max_weight,
        BLOCK=CHUNK,
    )
    following = mix(
        f_history=f_history,
        g_history=g_history,
        place=place,
        weights=tl.where(refills[:, None], 0.0, weights).to(tl.float32),
        back=back,
        newest=newest,
        undamped=undamped,
        DAMPED=DAMPED,
        WINDOW=WINDOW,
    )
    return following, kept < valid, accepted == 0
