"""The judgement of an iteration of a general map: from the sums of a sample to its decision. No row
is touched here. Specification: fastdeq/solvers/loop.py and the solvers beside it; columns:
state.py; Anderson acceleration: accelerate.py.

Every scalar is in float64, and what the specification has in the dtype T of the state is rounded to
it. Sums of chunks are added in an order that the shape alone decides. Every column is loaded before
any is stored, with a barrier in between, as all threads load it but one stores it.

Bytes per sample: 500 of scalars and 16 C of norms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ... import constants
from ..steps import sample
from ..steps.judge import RUNNING, Best, end, is_finite, judge, out_of_patience
from ..steps.momentum import learn_columns
from ..steps.sample import Row
from .accelerate import accelerate, add_to_trend
from .state import (
    ATOL,
    FLOOR,
    IMPROVED,
    LARGEST,
    MAX_ITER,
    MOMENTUM,
    MOST_IDLE,
    PLAIN_STEP,
    RATE,
    STEP,
    STEP_OMEGA,
    STILL,
    TOL,
)

_RESIDUAL_EPS = tl.constexpr(constants.RESIDUAL_EPS)
_INFINITY = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
_TILE = tl.constexpr(128)  # chunks whose norms are read at a time


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
    patience = tl.load(memory.settings + MOST_IDLE).to(tl.int32)
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
    tl.debug_barrier()
    tl.store(numbers + sample.BEST, now.residual)
    tl.store(numbers + sample.LEAST_NORM, now.least_norm)
    tl.store(numbers + sample.HALF_NOW, now.half_now)
    tl.store(numbers + sample.HALF_BEFORE, now.half_before)
    tl.store(numbers + sample.NORM, norm)
    tl.store(numbers + RATE, tl.where(is_finite(previous), norm / previous, _NAN))
    tl.store(flags + sample.MEETS, now.meets.to(tl.int32))
    tl.store(flags + sample.IDLE, now.idle)
    # The first point is there to return, whatever its value.
    tl.store(flags + IMPROVED, (improved | (k == 0)).to(tl.int32))

    fails = is_finite(norm) == 0
    step = PLAIN_STEP + 0 * k
    if COLUMNS > 0:
        if goes:
            add_to_trend(numbers, norm, k, max_iter // 2)
        choice = accelerate(memory, residual, previous, goes, chunks, most, window, COLUMNS)
        step, fails = choice.step, choice.fails
    if BALL:
        row = Row(flags, numbers, numbers)
        omega, _ = learn_columns(row, Norms(norm, previous), k, k >= 0, k < 0)
        step = MOMENTUM + 0 * k
        tl.store(numbers + STEP_OMEGA, omega)
    status = end(status, fails, stalls, now.meets)
    runs = status == RUNNING
    tl.store(flags + STEP, tl.where(runs, step, STILL))
    if status != RUNNING:
        tl.store(flags + sample.REQUESTED, sample.STOPPED)
        tl.store(flags + sample.STATUS, status)
        tl.store(flags + sample.ITERATIONS, k)
    return runs
