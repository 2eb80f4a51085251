"""Judging an evaluation: norms, best iterate, status, patience; for both engines.

Symbols: B samples of size n; k the number of the last evaluation. The functions return values
and store nothing, except ``settle``, ``stop`` and ``replace``. Those that take no rows work on a
scalar or on a vector of samples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ... import constants
from .affine_tile import LARGE, SHRINK
from .sample import (
    BEST,
    BEST_AT,
    EVALUATED,
    FULL,
    HALF_BEFORE,
    HALF_NOW,
    IDLE,
    ITERATIONS,
    LEAST_NORM,
    MEETS,
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
STILL_FALLING = tl.constexpr(constants.STILL_FALLING)
PATIENCE = tl.constexpr(constants.PATIENCE)
LARGEST_SIZE = tl.constexpr(torch.finfo(torch.float32).max ** constants.SIZE_EXPONENT)
FLOOR = tl.constexpr(constants.ROUNDING_FLOOR * torch.finfo(torch.float32).eps)
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
    # Norms of tiles; their squares, scaled where they would leave the range of float32.
    largest = tl.zeros((_TILES,), tl.float32)
    for start in range(0, tiles, _TILES):
        tile = start + tl.arange(0, _TILES)
        largest = tl.maximum(largest, tl.load(row + 2 * tile, mask=tile < tiles, other=0.0))
        largest = tl.maximum(largest, tl.load(row + 2 * tile + 1, mask=tile < tiles, other=0.0))
    scale = tl.where(tl.max(largest, axis=0) > LARGE, SHRINK, 1.0)
    for start in range(0, tiles, _TILES):
        tile = start + tl.arange(0, _TILES)
        g = scale * tl.load(row + 2 * tile, mask=tile < tiles, other=0.0)
        value = scale * tl.load(row + 2 * tile + 1, mask=tile < tiles, other=0.0)
        difference += g * g
        size += value * value
    norm = tl.sqrt_rn(tl.sum(difference, axis=0)) / scale
    length = tl.sqrt_rn(tl.sum(size, axis=0)) / scale
    return norm, tl.where(length < LARGEST_SIZE, norm / (length + RESIDUAL_EPS), _NAN)


class Best(NamedTuple):
    """What is known of a sample's verified iterates, see fastdeq/solvers/loop.py."""

    residual: Any  # of the best one, relative
    least_norm: Any
    meets: Any  # the best one meets the tolerance
    idle: Any
    half_now: Any
    half_before: Any


@triton.jit
def tolerance_at(tol, atol, norm, relative):
    """The relative residual |r| / (|f| + eps) that ``|r| <= atol + tol (|f| + eps)`` allows."""
    return tl.where((atol > 0) & (norm > 0), tol + atol * relative / norm, tol)


@triton.jit
def judge(best, norm, relative, k, limit, max_iter, FIXED: tl.constexpr):
    """After a full-precision evaluation of an iterate: (whether it is the best, Best, status), the
    last RUNNING where the solve goes on. FIXED: after exactly ``max_iter`` updates."""
    # Comparisons with NaN are false.
    meets = relative <= limit
    improved = (relative < best.residual) | ((norm < best.least_norm) & is_finite(relative))
    if FIXED:
        improved = tl.where(best.meets, improved & meets, improved | meets)
    else:  # what meets the tolerance ends the solve
        improved = improved | meets
    lower_norm = tl.where(norm < best.least_norm, norm, best.least_norm)
    now = Best(
        residual=tl.where(improved, relative, best.residual),
        least_norm=tl.where(improved, lower_norm, best.least_norm),
        meets=(best.meets | (improved & meets)) if FIXED else improved & meets,
        idle=tl.where(improved, 0, best.idle + 1),
        half_now=tl.where(norm < best.half_now, norm, best.half_now),
        half_before=best.half_before,
    )
    over = k >= max_iter if FIXED else now.meets | (k >= max_iter)
    status = tl.where(over, tl.where(now.meets, CONVERGED, MAX_ITER), RUNNING)
    return improved, now, status


@triton.jit
def out_of_patience(best, k, patience, floor, FIXED: tl.constexpr):
    """(whether the sample is to be given up, Best) after a full-precision evaluation of an iterate
    that did not end the solve. Relative residuals below ``floor`` may be rounding."""
    half = tl.maximum(patience // 2, 1)
    due = (best.idle % half == 0) & (k >= half)
    falls = best.half_now < STILL_FALLING * best.half_before
    stalls = due & (best.idle >= patience) & (falls == 0)
    stalls |= (k >= PATIENCE) & (best.idle >= PATIENCE) & (best.residual < floor)
    if FIXED:
        stalls = stalls & (k < 0)
    now = Best(
        residual=best.residual,
        least_norm=best.least_norm,
        meets=best.meets,
        idle=best.idle,
        half_now=tl.where(due, _INFINITY, best.half_now),
        half_before=tl.where(due, best.half_now, best.half_before),
    )
    return stalls, now


class Evaluation(NamedTuple):
    """What an evaluation found, and what is known of its sample with it."""

    full: Any  # in full precision
    norm: Any
    previous: Any  # the norm before
    relative: Any
    limit: Any  # the relative residual at which this iterate meets the tolerance
    best: Any
    best_at: Any
    stalls: Any  # out of patience


@triton.jit
def assess(
    row,
    sums,
    i,
    tiles,
    k,
    tol,
    atol,
    max_iter,
    patience,
    SLOTS: tl.constexpr,
    FIXED: tl.constexpr,
):
    """(Evaluation, status): what ``judge`` finds of one in full precision, and else what was."""
    full = tl.load(row.flags + EVALUATED) == FULL
    norm, relative = measure(sums, i, tiles)
    before = Best(
        residual=tl.load(row.numbers + BEST),
        least_norm=tl.load(row.numbers + LEAST_NORM),
        meets=tl.load(row.flags + MEETS) != 0,
        idle=tl.load(row.flags + IDLE),
        half_now=tl.load(row.numbers + HALF_NOW),
        half_before=tl.load(row.numbers + HALF_BEFORE),
    )
    limit = tolerance_at(tol, atol, norm, relative)
    improved, now, status = judge(before, norm, relative, k, limit, max_iter, FIXED)
    stalls, now = out_of_patience(now, k, patience, FLOOR, FIXED)
    seen = Evaluation(
        full=full,
        norm=norm,
        previous=tl.load(row.numbers + NORM),
        relative=relative,
        limit=limit,
        best=Best(
            residual=tl.where(full, now.residual, before.residual),
            least_norm=tl.where(full, now.least_norm, before.least_norm),
            meets=tl.where(full, now.meets, before.meets),
            idle=tl.where(full, now.idle, before.idle),
            half_now=tl.where(full, now.half_now, before.half_now),
            half_before=tl.where(full, now.half_before, before.half_before),
        ),
        best_at=tl.where(full & improved, k % SLOTS, tl.load(row.flags + BEST_AT)),
        stalls=full & stalls,
    )
    return seen, tl.where(full, status, RUNNING)


@triton.jit
def end(status, fails, stalls, meets):
    """The status of a sample that may have failed or stalled; ``meets``: where there is no stop
    test it may have converged before."""
    status = tl.where((status == RUNNING) & fails, tl.where(meets, CONVERGED, NONFINITE), status)
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
    tl.store(row.numbers + BEST, seen.best.residual)
    tl.store(row.numbers + LEAST_NORM, seen.best.least_norm)
    tl.store(row.numbers + HALF_NOW, seen.best.half_now)
    tl.store(row.numbers + HALF_BEFORE, seen.best.half_before)
    tl.store(row.flags + MEETS, seen.best.meets.to(tl.int32))
    tl.store(row.flags + IDLE, seen.best.idle)
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
