"""Heavy-ball steps at the beginning of a solve that energy.py or minres.py goes on with, as
``take_over`` in csrc/cpu/structured.h. The steps are those of advance.py, which has their symbols
and bytes, with its precision ramp; once handed over, every evaluation is exact. No GPU has run it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import advance, sample


@triton.jit
def momentum_step(
    flags_row,
    numbers_row,
    exact,
    norm,
    previous,
    relative,
    best,
    best_at,
    value,
    points,
    plane,  # from one slot of points to the next
    change,
    save,
    size,
    k,
    max_iter,
    tol,
    RAMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """After an evaluation: (whether the solve is handed over, how the next one is made). If it is
    not, the next point is written, to slot (k + 1) % 2 of two."""
    finite = sample.is_finite(norm)
    back = (exact | finite) == 0  # perhaps rounding is to blame: to the best point, exactly
    wanted = tl.full((), sample.EXACT, tl.int32)
    trusted = exact
    if RAMP:
        # Nearer to the goal the rounding hides how fast the residual falls.
        was_exact = tl.load(flags_row + sample.SINCE_ANCHOR) == 0
        clear = relative > 1.5 * tl.load(numbers_row + sample.GOAL)
        trusted = tl.where(exact, was_exact, clear)
        before, goal, since, narrowest = advance.reanchor(
            numbers_row, flags_row, exact, relative, 1, tol
        )
        narrowest = tl.where(back, sample.EXACT, narrowest)
        wanted = sample.next_kind(
            relative, norm, previous, 1, since, before, goal, narrowest, 0, k, max_iter
        )
        tl.debug_barrier()  # all threads have loaded what one of them stores
        advance.store_ramp(numbers_row, flags_row, before, goal, since, narrowest)
    omega, slow = advance.momentum(numbers_row, flags_row, norm, previous, k, trusted, back)
    hands_over = (slow | (exact & (finite == 0))) & sample.is_finite(best)
    wanted = tl.where(hands_over, sample.EXACT, wanted)
    if hands_over == 0:
        point_row = points + (k % 2) * plane
        target_row = points + ((k + 1) % 2) * plane
        best_row = points + best_at * plane
        advance.momentum_rows(
            *(value, point_row, target_row, points + 2 * plane, best_row, change),
            *(size, omega, save, back, wanted == sample.NARROW, RAMP, BLOCK),
        )
    return hands_over, wanted
