"""Judging an evaluation: norms, best iterate, status, patience; for both engines.

Symbols: B samples of size n; k the number of the last evaluation. The functions return values
and store nothing, except ``settle``, ``stop`` and ``replace``. Those that take no rows work on a
scalar or on a vector of samples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ... import constants
from .sample import (
    BEST,
    BEST_AT,
    EVALUATED,
    FULL,
    IDLE,
    ITERATIONS,
    NORM,
    REQUESTED,
    STATUS,
    STOPPED,
)

# Status of a result, and of a sample that has none yet.
RUNNING = tl.constexpr(-1)
CONVERGED = tl.constexpr(constants.STATUS_CONVERGED)
MAX_ITER = tl.constexpr(constants.STATUS_MAX_ITER)
STAGNATED = tl.constexpr(constants.STATUS_STAGNATED)
NONFINITE = tl.constexpr(constants.STATUS_NONFINITE)

RESIDUAL_EPS = tl.constexpr(constants.RESIDUAL_EPS)
_INFINITY = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
_TILES = tl.constexpr(64)  # sums read at a time


@triton.jit
def is_finite(x):
    return tl.abs(x) < _INFINITY  # false for NaN


@triton.jit
def only(inside, condition):
    """The mask ``inside`` where a scalar condition holds. Not ``&``: in the interpreter of Triton
    3.9 a scalar comparison that is spread over a tile takes the dtype of what was compared."""
    return tl.where(condition, inside, False)


@triton.jit
def measure(sums, sample, tiles):
    """(|value - point|, the relative residual) of the evaluation; NaN where |value| overflows, as
    next to infinity every residual would be small."""
    row = sums + sample.to(tl.int64) * tiles * 2
    difference = tl.zeros((_TILES,), tl.float32)
    size = tl.zeros((_TILES,), tl.float32)
    for start in range(0, tiles, _TILES):
        tile = start + tl.arange(0, _TILES)
        difference += tl.load(row + 2 * tile, mask=tile < tiles, other=0.0)
        size += tl.load(row + 2 * tile + 1, mask=tile < tiles, other=0.0)
    norm = tl.sqrt_rn(tl.sum(difference, axis=0))
    square = tl.sum(size, axis=0)
    relative = norm / (tl.sqrt_rn(square) + RESIDUAL_EPS)
    return norm, tl.where(square < _INFINITY, relative, _NAN)


@triton.jit
def judge(relative, best, idle, k, tol, max_iter, FIXED: tl.constexpr):
    """After a full-precision evaluation of an iterate: (improved, best, idle, status), the last
    RUNNING where the solve goes on. FIXED: after exactly ``max_iter`` updates."""
    improved = relative < best  # false for NaN
    best = tl.where(improved, relative, best)
    idle = tl.where(improved, 0, idle + 1)
    converged = best <= tol
    over = k >= max_iter if FIXED else converged | (k >= max_iter)
    status = tl.where(over, tl.where(converged, CONVERGED, MAX_ITER), RUNNING)
    return improved, best, idle, status


class Evaluation(NamedTuple):
    """What an evaluation found, and what is known of its sample with it."""

    full: Any  # in full precision
    norm: Any
    previous: Any  # the norm before
    relative: Any
    best: Any
    idle: Any
    best_at: Any


@triton.jit
def assess(row, sums, i, tiles, k, tol, max_iter, SLOTS: tl.constexpr, FIXED):
    """(Evaluation, status): what ``judge`` finds of one in full precision, and else what was."""
    full = tl.load(row.flags + EVALUATED) == FULL
    norm, relative = measure(sums, i, tiles)
    best = tl.load(row.numbers + BEST)
    idle = tl.load(row.flags + IDLE)
    improved, lower, more, status = judge(relative, best, idle, k, tol, max_iter, FIXED)
    seen = Evaluation(
        full=full,
        norm=norm,
        previous=tl.load(row.numbers + NORM),
        relative=relative,
        best=tl.where(full, lower, best),
        idle=tl.where(full, more, idle),
        best_at=tl.where(full & improved, k % SLOTS, tl.load(row.flags + BEST_AT)),
    )
    return seen, tl.where(full, status, RUNNING)


@triton.jit
def failure(best, tol):
    """The status of a sample that cannot go on: where there is no stop test it may have converged
    before."""
    return tl.where(best <= tol, CONVERGED, NONFINITE)


@triton.jit
def out_of_patience(idle, k, patience, FIXED: tl.constexpr):
    """Asked after a step that did not fail, of a sample just evaluated in full precision."""
    idles = (k >= patience) & (idle >= patience)
    return idles & (k < 0) if FIXED else idles


@triton.jit
def end(status, fails, stalls, best, tol):
    """The status of a sample that may have failed or stalled."""
    status = tl.where((status == RUNNING) & fails, failure(best, tol), status)
    return tl.where((status == RUNNING) & stalls, STAGNATED, status)


@triton.jit
def stop(row, status, k):
    tl.store(row.flags + REQUESTED, STOPPED)
    tl.store(row.flags + STATUS, status)
    tl.store(row.flags + ITERATIONS, k)
    tl.atomic_add(row.remaining, -1, sem="relaxed")


@triton.jit
def settle(row, seen, status, target, k, SLOTS: tl.constexpr):
    """Stores what an evaluation meant, and stops a sample that is not RUNNING. Returns whether the
    best iterate lies in ``target``, the slot of points that is written next. All columns must have
    been loaded."""
    tl.debug_barrier()
    save = seen.best_at == target
    tl.store(row.numbers + BEST, seen.best)
    tl.store(row.flags + IDLE, seen.idle)
    tl.store(row.flags + BEST_AT, tl.where(save & (status == RUNNING), SLOTS, seen.best_at))
    if status != RUNNING:
        stop(row, status, k)
    return save


class Target(NamedTuple):
    """Where the next point goes; with ``save`` what lies there, the best iterate, is kept."""

    row: Any
    saved: Any
    save: Any


@triton.jit
def replace(target, entry, inside, following):
    """Stores the next point. The same thread reads and writes an entry, so this needs no
    barrier."""
    kept = tl.load(target.row + entry, mask=only(inside, target.save), other=0.0)
    tl.store(target.saved + entry, kept, mask=only(inside, target.save))
    tl.store(target.row + entry, following, mask=inside)
