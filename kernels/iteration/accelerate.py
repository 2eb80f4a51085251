"""Anderson acceleration in an iteration of a general map: what a sample makes of an evaluation,
from the products with the residuals in its history. No row is touched here. Algorithm:
fastdeq/solvers/anderson.py; small solve: ../anderson_weights.py; columns and memory: state.py.

Bytes per sample, with c entries of the history in use: 8 P C of products, 8 c^2 read and 16 c
written of the Gram matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..anderson_weights import solve_small
from ..steps import sample
from ..steps.judge import is_finite
from .state import (
    ACCELERATE_ABOVE,
    HELD,
    LATEST,
    MAX_WEIGHT,
    MIDDLE,
    MIX,
    PLAIN_STEP,
    RANK_TOLERANCE,
    REGULARIZATION,
    SAFEGUARD,
    SLOT,
    TAKE_BACK,
    TREND_SPAN,
)

_INFINITY = tl.constexpr(float("inf"))
_PRODUCTS = tl.constexpr(512)  # products that are read at a time


@triton.jit
def row_of_products(memory, chunks, COLUMNS: tl.constexpr):
    """<g, g_i> (P,) with the entries of the history, newest first."""
    column = tl.arange(0, COLUMNS)
    row = tl.zeros((_PRODUCTS // COLUMNS, COLUMNS), tl.float64)
    for start in range(0, chunks, _PRODUCTS // COLUMNS):
        chunk = start + tl.arange(0, _PRODUCTS // COLUMNS)
        at = chunk[:, None] * COLUMNS + column[None, :]
        row += tl.load(memory.products + at, mask=(chunk < chunks)[:, None], other=0.0)
    return tl.sum(row, axis=0)


class Weights(NamedTuple):
    gamma: Any  # (P,), newest first
    rejected: Any  # 0 or 1
    dropped: Any


@triton.jit
def mixing_weights(memory, row, square, slots, count, window, COLUMNS: tl.constexpr):
    """Of the first ``count`` entries of the history, from the Gram matrix of those before."""
    column = tl.arange(0, COLUMNS)
    used = column < count
    one = tl.arange(0, 1)  # the only sample of this program
    gram = memory.gram + one
    at = (slots[:, None] * window + slots[None, :])[None, :, :]
    both = (used[:, None] & used[None, :])[None, :, :]
    pairs = tl.load(gram[:, None, None] + at, mask=both, other=0.0)
    own = tl.load(gram[:, None] + (slots * (window + 1))[None, :], mask=used[None, :], other=0.0)
    weights, kept, accepted = solve_small(
        pairs=pairs,
        own=own,
        row=row[None, :],
        diagonal=square + 0.0 * one,
        column=column,
        valid=one + count,
        regularization=tl.load(memory.settings + REGULARIZATION),
        rank_tolerance=tl.load(memory.settings + RANK_TOLERANCE),
        max_weight=tl.load(memory.settings + MAX_WEIGHT),
    )
    return Weights(
        gamma=tl.sum(tl.where(accepted[:, None], weights, 0.0), axis=0),
        rejected=1 - tl.max(accepted.to(tl.int32), axis=0),
        dropped=(tl.sum(kept, axis=0) < count).to(tl.int32),
    )


@triton.jit
def enter_history(memory, row, square, slots, count, slot, window, COLUMNS: tl.constexpr):
    """Extends the Gram matrix by what is about to lie in ``slot``."""
    column = tl.arange(0, COLUMNS)
    others = (column < count) & (slots != slot)
    tl.store(memory.gram + slot * (window + 1), square)
    tl.store(memory.gram + slot * window + slots, row, mask=others)
    tl.store(memory.gram + slots * window + slot, row, mask=others)


class Choice(NamedTuple):
    """What a solver makes of an evaluation."""

    step: Any
    fails: Any  # it cannot go on


@triton.jit
def accelerate(memory, residual, previous, goes, chunks, most, window, COLUMNS: tl.constexpr):
    """Anderson's Choice where the sample ``goes`` on, unless it fails; stores what was learned.
    ``most``: differences that the next evaluation may use."""
    flags, numbers = memory.flags, memory.numbers
    norm = residual.norm
    accelerated = tl.load(flags + sample.ACCELERATED) != 0
    refills = tl.load(flags + sample.REFILLS) != 0
    count = tl.load(flags + sample.COUNT)
    held = tl.load(flags + HELD)
    trusted_norm = tl.load(numbers + sample.TRUSTED_NORM)
    # NaN compares false: "not (norm <= limit)" takes a step back that is not finite as well.
    slow = (norm <= tl.load(memory.settings + ACCELERATE_ABOVE) * previous) == 0
    plain = (tl.load(flags + sample.PLAIN) != 0) & (slow == 0)
    above = (norm <= tl.load(memory.settings + SAFEGUARD) * trusted_norm) == 0
    back = (plain == 0) & accelerated & above
    fails = (is_finite(norm) | back) == 0
    goes = goes & (fails == 0)
    mixes = goes & ((plain | back) == 0)

    # An evaluation enters the place after the last, or that of the oldest.
    column = tl.arange(0, COLUMNS)
    slots = tl.load(memory.places + column, mask=column < held, other=0)
    next_count = tl.minimum(count + 1, most)
    oldest = tl.sum(tl.where(column == held - 1, slots, 0), axis=0)
    slot = tl.where(next_count > held, held, oldest)
    next_held = tl.maximum(held, next_count)
    row = tl.zeros((COLUMNS,), tl.float64)
    gamma = tl.zeros((COLUMNS,), tl.float64)
    rejected = tl.full((), 0, tl.int32)
    dropped = tl.full((), 0, tl.int32)
    if mixes & (count > 0):
        row = row_of_products(memory, chunks, COLUMNS)
        if refills == 0:
            found = mixing_weights(memory, row, residual.square, slots, count, window, COLUMNS)
            gamma = found.gamma
            rejected = found.rejected
            dropped = found.dropped
    # Late, so that these take no registers from the solve.
    newer = tl.load(memory.places + column - 1, mask=(column > 0) & (column <= held), other=0)
    backs = tl.load(flags + sample.REJECTS)
    caps = tl.load(flags + sample.REJECTS + 1)
    cuts = tl.load(flags + sample.REJECTS + 2)
    tl.debug_barrier()
    if mixes:
        enter_history(memory, row, residual.square, slots, count, slot, window, COLUMNS)
        tl.store(memory.gamma + slots, gamma, mask=column < held)
        tl.store(
            memory.places + column, tl.where(column == 0, slot, newer), mask=column < next_held
        )
        tl.store(flags + HELD, next_held)
        tl.store(numbers + sample.TRUSTED_NORM, norm)
    first = tl.sum(tl.where(column == 0, slots, 0), axis=0)
    tl.store(flags + SLOT, tl.where(mixes, slot, first))
    tl.store(flags + sample.COUNT, tl.where(mixes, next_count, tl.where(back, 0, count)))
    still_refills = refills & ((mixes == 0) | (next_count < most))
    tl.store(flags + sample.REFILLS, (back | still_refills).to(tl.int32))
    tl.store(flags + sample.PLAIN, plain.to(tl.int32))
    trusts = mixes & (refills == 0) & (rejected == 0) & (count > 0)
    tl.store(flags + sample.ACCELERATED, trusts.to(tl.int32))
    tl.store(flags + sample.REJECTS, backs + (goes & back).to(tl.int32))
    tl.store(flags + sample.REJECTS + 1, caps + rejected)
    tl.store(flags + sample.REJECTS + 2, cuts + dropped)
    return Choice(tl.where(plain, PLAIN_STEP, tl.where(back, TAKE_BACK, MIX)), fails)


@triton.jit
def add_to_trend(numbers, norm, k, middle_at):
    column = tl.arange(0, TREND_SPAN)
    latest = tl.load(numbers + LATEST + column)
    latest = tl.where(column == k % TREND_SPAN, norm, latest)
    least = tl.min(tl.where(latest < _INFINITY, latest, _INFINITY), axis=0)
    middle = tl.where(k == middle_at, least, tl.load(numbers + MIDDLE))
    tl.debug_barrier()
    tl.store(numbers + LATEST + column, latest)
    tl.store(numbers + MIDDLE, middle)
