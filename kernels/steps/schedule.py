"""The precision schedule: which evaluations have low-precision products.

As in csrc/common/precision_schedule.h, with bfloat16 alone: a run of low-precision evaluations is
ended by one in full precision, which is due when the residual has fallen to GOAL. The drops from
one to the next are equal on the way to the tolerance. The columns are those of sample.py. ``plain``
steps are those of Picard iteration and of the heavy ball; a rate of convergence is known from each
of them, that of accelerated ones only from a whole run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import constants
from .judge import is_finite
from .sample import (
    FULL,
    GOAL,
    LAST_FULL,
    LOW,
    LOWEST,
    REQUESTED,
    SINCE_FULL,
)

_INFINITY = tl.constexpr(float("inf"))
_DROP = tl.constexpr(constants.DROP_BFLOAT16)
_DROP_ACCELERATED = tl.constexpr(constants.DROP_ACCELERATED)
_LONGEST = tl.constexpr(constants.LONGEST_LOW_PRECISION)
_TARGET_FRACTION = tl.constexpr(constants.TARGET_FRACTION)
_UNKNOWN_RATE = tl.constexpr(constants.UNKNOWN_RATE)
_SLOWEST_RATE = tl.constexpr(constants.SLOWEST_RATE)
_TRUST_FACTOR = tl.constexpr(constants.TRUST_FACTOR)
_REQUIRED_GAIN = tl.constexpr(constants.REQUIRED_GAIN)


@triton.jit
def next_goal(relative, last_full, goal, since_full, lowest, plain, tol):
    """At a full-precision evaluation: (GOAL, LOWEST)."""
    gains = relative <= _REQUIRED_GAIN * last_full
    vain = (since_full > 0) & (goal < _INFINITY) & (gains == 0)
    largest = tl.where(plain != 0, _DROP, _DROP_ACCELERATED)
    target = _TARGET_FRACTION * tol
    ahead = (target > 0) & (relative > target)
    total = tl.log(tl.where(ahead, relative / tl.where(ahead, target, 1.0), 2.0))
    equal = tl.exp(total / tl.ceil(total / tl.log(largest)))
    return relative / tl.where(ahead, equal, largest), tl.where(vain, FULL, lowest)


@triton.jit
def next_kind(seen, plain, since_full, last_full, goal, lowest, count, k, max_iter):
    """FULL or LOW for evaluation k + 1, as REQUESTED has it."""
    stepwise = tl.where(is_finite(seen.previous), seen.norm / seen.previous, _UNKNOWN_RATE)
    some = tl.maximum(since_full, 1)
    mean = tl.exp2(tl.log2(seen.relative / last_full) / some)
    rate = tl.where(plain != 0, stepwise, tl.where(since_full > 0, mean, _UNKNOWN_RATE))
    gets_on = tl.where(plain != 0, rate <= _SLOWEST_RATE, rate < 1)  # false for NaN
    # A step taken back is a large change.
    accelerated_may = (since_full < _LONGEST) & (count > 0)
    low = gets_on & (k + 1 < max_iter) & ((plain != 0) | accelerated_may)
    low = low & (seen.relative * rate > goal) & (lowest == LOW)
    return tl.where(low, LOW, FULL)


@triton.jit
def clear_of_goal(row, relative):
    """Nearer to the goal the rounding hides how fast the residual falls."""
    return relative > _TRUST_FACTOR * tl.load(row.numbers + GOAL)


@triton.jit
def after_evaluation(row, seen, plain):
    """(LAST_FULL, GOAL, SINCE_FULL, LOWEST). An evaluation that is in full precision only because
    another sample of its tile is comes too early to judge low-precision ones by."""
    asked = tl.load(row.flags + REQUESTED) == FULL
    last_full = tl.load(row.numbers + LAST_FULL)
    goal = tl.load(row.numbers + GOAL)
    since = tl.load(row.flags + SINCE_FULL)
    lowest = tl.load(row.flags + LOWEST)
    in_run = tl.where(asked, since, 0)
    following, allowed = next_goal(
        seen.relative, last_full, goal, in_run, lowest, plain, seen.limit
    )
    return (
        tl.where(seen.full, seen.relative, last_full),
        tl.where(seen.full, following, goal),
        tl.where(seen.full, 0, since + 1),
        tl.where(seen.full, allowed, lowest),
    )


@triton.jit
def store(row, last_full, goal, since_full, lowest):
    tl.store(row.numbers + LAST_FULL, last_full)
    tl.store(row.numbers + GOAL, goal)
    tl.store(row.flags + SINCE_FULL, since_full)
    tl.store(row.flags + LOWEST, lowest)


@triton.jit
def after_plain_step(row, seen, to_best, k, max_iter, ON: tl.constexpr):
    """(whether the norm shows how fast the residual falls, REQUESTED) after an evaluation of a
    plain or heavy-ball step, whose columns are stored; ``to_best``: the next point is the best one,
    evaluated in full precision. REQUESTED is not stored here."""
    kind = tl.full((), FULL, tl.int32)
    shows = seen.full
    if ON:
        was_full = tl.load(row.flags + SINCE_FULL) == 0
        shows = tl.where(seen.full, was_full, clear_of_goal(row, seen.relative))
        last_full, goal, since, lowest = after_evaluation(row, seen, 1)
        lowest = tl.where(to_best, FULL, lowest)
        kind = next_kind(seen, 1, since, last_full, goal, lowest, 0, k, max_iter)
        tl.debug_barrier()  # all threads have loaded what one of them stores
        store(row, last_full, goal, since, lowest)
    return shows, kind
