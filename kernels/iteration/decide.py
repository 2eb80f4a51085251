"""The judgement of an iteration of a general map: from the sums of a sample to its decision and the
weights of Anderson acceleration. No row is touched here. Specification: fastdeq/solvers/loop.py and
the solvers beside it; columns: state.py.

Every scalar is in float64, and what the specification has in the dtype T of the state is rounded to
it. Sums of chunks are added in an order that the shape alone decides. Every column is loaded before
any is stored, with a barrier in between, as all threads load it but one stores it.

Bytes per sample: 500 of scalars, 16 C of norms, and with c entries of the history in use 8 P C of
products, 8 c^2 read and 16 c written of the Gram matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ... import constants
from ..anderson_weights import solve_small
from ..steps import sample
from ..steps.judge import RUNNING, Best, end, is_finite, judge, out_of_patience
from ..steps.momentum import learn_columns
from ..steps.sample import Row
from .state import (
    ACCELERATE_ABOVE,
    ATOL,
    FLOOR,
    HELD,
    IMPROVED,
    LARGEST,
    LATEST,
    MAX_ITER,
    MAX_WEIGHT,
    MIDDLE,
    MIX,
    MOMENTUM,
    PATIENCE,
    PLAIN_STEP,
    RANK_TOLERANCE,
    RATE,
    REGULARIZATION,
    SAFEGUARD,
    SLOT,
    STEP,
    STEP_OMEGA,
    STILL,
    TAKE_BACK,
    TOL,
    TREND_SPAN,
)

_RESIDUAL_EPS = tl.constexpr(constants.RESIDUAL_EPS)
_INFINITY = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
_TILE = tl.constexpr(32)  # chunks whose sums are read at a time


class Residual(NamedTuple):
    """|g|^2, |g|, relative to |f|, and the latter that the tolerance allows: the last two of the
    part that is furthest from it."""

    square: Any
    norm: Any
    relative: Any
    limit: Any


@triton.jit
def residual_of(memory, chunks, parts, DTYPE: tl.constexpr, MANY: tl.constexpr):
    tol = tl.load(memory.settings + TOL)
    atol = tl.load(memory.settings + ATOL)
    square = tl.full((), 0.0, tl.float64)
    size_square = tl.full((), 0.0, tl.float64)
    worst = tl.full((), float("-inf"), tl.float64)
    relative = tl.full((), float("nan"), tl.float64)
    limit = tol
    for p in range(parts):
        first = 0 * tl.cast(chunks, tl.int64)
        last = first + chunks
        if MANY:
            first = tl.load(memory.firsts + p)
            last = tl.load(memory.firsts + p + 1)
        difference = tl.zeros((_TILE,), tl.float64)
        size = tl.zeros((_TILE,), tl.float64)
        for start in range(first, last, _TILE):
            chunk = start + tl.arange(0, _TILE)
            difference += tl.load(memory.norms + 2 * chunk, mask=chunk < last, other=0.0)
            size += tl.load(memory.norms + 2 * chunk + 1, mask=chunk < last, other=0.0)
        own_square, own_size = tl.sum(difference, axis=0), tl.sum(size, axis=0)
        square += own_square
        size_square += own_size
        length = tl.sqrt(own_size).to(DTYPE).to(tl.float64) + _RESIDUAL_EPS
        ratio = tl.sqrt(own_square).to(DTYPE).to(tl.float64) / length
        allowed = tol + atol / length
        # NaN compares false: such a part is further than all others, and stays so.
        further = (ratio - allowed <= worst) == 0
        worst = tl.where(further, tl.where(ratio == ratio, ratio - allowed, _INFINITY), worst)
        relative = tl.where(further, ratio.to(DTYPE).to(tl.float64), relative)
        limit = tl.where(further, allowed, limit)
    # Next to infinity every residual would be small.
    bounded = tl.sqrt(size_square) < tl.load(memory.settings + LARGEST)
    return Residual(
        square=square,
        norm=tl.sqrt(square).to(DTYPE).to(tl.float64),
        relative=tl.where(bounded, relative, _NAN),
        limit=limit,
    )


@triton.jit
def row_of_products(memory, chunks, COLUMNS: tl.constexpr):
    """<g, g_i> (P,) with the entries of the history, newest first."""
    column = tl.arange(0, COLUMNS)
    row = tl.zeros((COLUMNS,), tl.float64)
    for chunk in range(chunks):
        row += tl.load(memory.products + chunk * COLUMNS + column)
    return row


class Weights(NamedTuple):
    gamma: Any  # (P,), newest first
    rejected: Any  # 0 or 1
    dropped: Any


@triton.jit
def mixing_weights(memory, row, square, slots, count, window, COLUMNS: tl.constexpr):
    """Of the first ``count`` entries of the history, from the Gram matrix of those before."""
    column = tl.arange(0, COLUMNS)
    used = column < count
    at = slots[:, None] * window + slots[None, :]
    pairs = tl.load(memory.gram + at, mask=used[:, None] & used[None, :], other=0.0)
    own = tl.load(memory.gram + slots * (window + 1), mask=used, other=0.0)
    one = tl.arange(0, 1)  # the only sample of this program
    weights, kept, accepted = solve_small(
        pairs=pairs[None, :, :],
        own=own[None, :],
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
def accelerate(
    memory, residual, previous, goes, chunks, most, window, COLUMNS: tl.constexpr
):
    """Anderson's Choice where the sample ``goes`` on, unless it fails; stores what was learned.
    ``most``: differences that the next evaluation may use."""
    flags, numbers = memory.flags, memory.numbers
    norm = residual.norm
    accelerated = tl.load(flags + sample.ACCELERATED) != 0
    refills = tl.load(flags + sample.REFILLS) != 0
    count = tl.load(flags + sample.COUNT)
    held = tl.load(flags + HELD)
    backs = tl.load(flags + sample.REJECTS)
    caps = tl.load(flags + sample.REJECTS + 1)
    cuts = tl.load(flags + sample.REJECTS + 2)
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
    newer = tl.load(memory.places + column - 1, mask=(column > 0) & (column <= held), other=0)
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


class Norms(NamedTuple):
    """Of this evaluation and of the one before."""

    norm: Any
    previous: Any


@triton.jit
def decide(
    memory,
    chunks,
    parts,
    k,
    most,
    window,
    DTYPE: tl.constexpr,
    MANY: tl.constexpr,  # parts of the state
    FIXED: tl.constexpr,
    BALL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """After evaluation k of a sample that runs: stores the decision. Returns whether the sample
    still runs."""
    flags, numbers = memory.flags, memory.numbers
    residual = residual_of(memory, chunks, parts, DTYPE, MANY)
    norm = residual.norm
    max_iter = tl.load(memory.settings + MAX_ITER).to(tl.int32)
    patience = tl.load(memory.settings + PATIENCE).to(tl.int32)
    floor = tl.load(memory.settings + FLOOR)
    previous = tl.load(numbers + sample.NORM)
    before = Best(
        residual=tl.load(numbers + sample.BEST),
        least_norm=tl.load(numbers + sample.LEAST_NORM),
        meets=tl.load(flags + sample.MEETS) != 0,
        idle=tl.load(flags + sample.IDLE),
        half_now=tl.load(numbers + sample.HALF_NOW),
        half_before=tl.load(numbers + sample.HALF_BEFORE),
    )
    improved, now, status = judge(
        before, norm, residual.relative, k, residual.limit, max_iter, FIXED
    )
    stalls, now = out_of_patience(now, k, patience, floor, FIXED)
    goes = status == RUNNING
    fails = is_finite(norm) == 0
    step = PLAIN_STEP + 0 * k
    if COLUMNS > 0:
        choice = accelerate(memory, residual, previous, goes, chunks, most, window, COLUMNS)
        step, fails = choice.step, choice.fails
        if goes:
            add_to_trend(numbers, norm, k, max_iter // 2)
    if BALL:
        row = Row(flags, numbers, numbers)
        omega, _ = learn_columns(row, Norms(norm, previous), k, k >= 0, k < 0)
        step = MOMENTUM + 0 * k
    status = end(status, fails, stalls, now.meets)
    runs = status == RUNNING
    tl.debug_barrier()
    tl.store(numbers + sample.BEST, now.residual)
    tl.store(numbers + sample.LEAST_NORM, now.least_norm)
    tl.store(numbers + sample.HALF_NOW, now.half_now)
    tl.store(numbers + sample.HALF_BEFORE, now.half_before)
    tl.store(numbers + sample.NORM, norm)
    tl.store(numbers + RATE, tl.where(is_finite(previous), norm / previous, _NAN))
    if BALL:
        tl.store(numbers + STEP_OMEGA, omega)
    tl.store(flags + sample.MEETS, now.meets.to(tl.int32))
    tl.store(flags + sample.IDLE, now.idle)
    # The first point is there to return, whatever its value.
    tl.store(flags + IMPROVED, (improved | (k == 0)).to(tl.int32))
    tl.store(flags + STEP, tl.where(runs, step, STILL))
    if status != RUNNING:
        tl.store(flags + sample.REQUESTED, sample.STOPPED)
        tl.store(flags + sample.STATUS, status)
        tl.store(flags + sample.ITERATIONS, k)
    return runs
