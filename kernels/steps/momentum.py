"""Heavy-ball steps: the kernel of that solver, and the beginning of the energy solver and MINRES.
Algorithm: fastdeq/solvers/heavy_ball.py; scalars of a sample, buffers and their bytes: sample.py.

Symbols: B samples of size n; z_k the point and f_k the value of evaluation k.

    z = z_{k-1} + omega (f_k - z_{k-1})

Evaluation k is at slot k % 2 of points, and the next point takes the place of the one before.

Tile layout: one program per sample, which walks its rows in pieces of BLOCK.

Bytes per sample and launch: 8 n read and 4 n written. The precision schedule: before a
low-precision evaluation 4 n read and 2 n written. 4 n read and written more where a best iterate
was not followed by a better one.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ... import constants
from ...solvers.solve_options import SolveOptions
from ..launch import limits, on_device
from . import sample, schedule
from .judge import (
    RUNNING,
    Target,
    assess,
    end,
    is_finite,
    only,
    replace,
    settle,
)
from .sample import Samples, Steps, rows_tile

SLOTS = tl.constexpr(2)  # of points
_LARGEST_RADIUS = tl.constexpr(constants.LARGEST_RADIUS)
_LEARN_AFTER = tl.constexpr(constants.LEARN_AFTER)
_HALVE_WITHIN = tl.constexpr(constants.HALVE_WITHIN)


@triton.jit
def _root(x):
    if x.dtype == tl.float32:  # where sqrt need not be rounded to nearest
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def learn(
    norm,
    previous,
    norm_1,
    norm_2,
    radius,
    previous_omega,
    omega,
    norm_to_halve,
    steps_since_halved,
    k,
    trusted,
):
    """After the step with ``omega``: takes in the residual norm of the last evaluation, of a point
    found with ``previous_omega``; ``previous``, ``norm_1``, ``norm_2`` are those of one, two and
    three evaluations before. Without ``trusted`` norms the estimate of the radius stays.

    Returns (radius, previous_omega, omega, norm_to_halve, steps_since_halved, slow), the last true
    where the residual does not halve in time. The next NORM_1 is ``previous``, the next NORM_2
    ``norm_1``.
    """
    one = norm / previous
    three = tl.exp2(tl.log2(norm / norm_2) / 3)
    left = tl.where(one < three, one, three)
    gained = previous_omega - 1
    better = trusted & (k > _LEARN_AFTER) & (left > _root(gained))  # false for NaN
    seen = (left * left + gained) / (previous_omega * left)
    largest = tl.zeros_like(seen) + _LARGEST_RADIUS  # in the dtype of the norms
    seen = tl.where(seen < largest, seen, largest)
    radius = tl.where(better & (seen > radius), seen, radius)
    halved = norm <= 0.5 * norm_to_halve
    norm_to_halve = tl.where(halved, norm, norm_to_halve)
    steps_since_halved = tl.where(halved, 0, steps_since_halved + 1)
    following = 2 / (1 + _root(1 - radius * radius))
    slow = steps_since_halved >= _HALVE_WITHIN
    return radius, omega, following, norm_to_halve, steps_since_halved, slow


@triton.jit
def learn_columns(row, seen, k, trusted, to_best):
    """(omega of the step to take, whether the residual does not halve in time); stores what was
    learned. ``to_best``: the next point is the best one, and momentum is lost."""
    norm_1 = tl.load(row.numbers + sample.NORM_1)
    norm_2 = tl.load(row.numbers + sample.NORM_2)
    radius = tl.load(row.numbers + sample.RADIUS)
    previous_omega = tl.load(row.numbers + sample.PREVIOUS_OMEGA)
    omega = tl.load(row.numbers + sample.OMEGA)
    norm_to_halve = tl.load(row.numbers + sample.NORM_TO_HALVE)
    since = tl.load(row.flags + sample.STEPS_SINCE_HALVED)
    next_radius, next_previous, next_omega, next_to_halve, next_since, slow = learn(
        norm=seen.norm,
        previous=seen.previous,
        norm_1=norm_1,
        norm_2=norm_2,
        radius=radius,
        previous_omega=previous_omega,
        omega=omega,
        norm_to_halve=norm_to_halve,
        steps_since_halved=since,
        k=k,
        trusted=trusted,
    )
    tl.debug_barrier()
    tl.store(row.numbers + sample.NORM_1, tl.where(to_best, norm_1, seen.previous))
    tl.store(row.numbers + sample.NORM_2, tl.where(to_best, norm_2, norm_1))
    tl.store(row.numbers + sample.RADIUS, tl.where(to_best, radius, next_radius))
    tl.store(row.numbers + sample.PREVIOUS_OMEGA, tl.where(to_best, previous_omega, next_previous))
    tl.store(row.numbers + sample.OMEGA, tl.where(to_best, 1.0, next_omega))
    tl.store(row.numbers + sample.NORM_TO_HALVE, tl.where(to_best, norm_to_halve, next_to_halve))
    tl.store(row.flags + sample.STEPS_SINCE_HALVED, tl.where(to_best, since, next_since))
    return omega, slow & (to_best == 0)


class Rows(NamedTuple):
    """Of one sample: its value, its points and their stride, its change."""

    value: Any
    points: Any
    slot_stride: Any
    change: Any


@triton.jit
def target_of(points_row, slot_stride, k, save):
    """Where the next point goes, of two slots in turn."""
    stride = tl.cast(slot_stride, tl.int64)
    return Target(points_row + ((k + 1) % 2) * stride, points_row + 2 * stride, save)


@triton.jit
def momentum_step(
    row,
    seen,
    rows,
    save,  # the best iterate lies where the next point goes
    size,
    k,
    max_iter,
    MAY_END: tl.constexpr,  # another method goes on where these steps are slow
    SCHEDULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """After an evaluation: (whether these steps end, REQUESTED). If they do not, the next point is
    written and, for a low-precision evaluation, the change."""
    finite = is_finite(seen.norm)
    to_best = (seen.full | finite) == 0  # perhaps rounding is to blame
    trusted, kind = schedule.after_plain_step(row, seen, to_best, k, max_iter, SCHEDULE)
    omega, slow = learn_columns(row, seen, k, trusted, to_best)
    ends = (slow | (seen.full & (finite == 0))) & is_finite(seen.best.residual)
    if not MAY_END:
        ends = ends & (k < 0)
    kind = tl.where(ends, sample.FULL, kind)
    if ends == 0:
        low = kind == sample.LOW
        target = target_of(rows.points, rows.slot_stride, k, save)
        point_row = rows.points + (k % SLOTS).to(tl.int64) * rows.slot_stride
        best_row = rows.points + seen.best_at.to(tl.int64) * rows.slot_stride
        for start in range(0, size, BLOCK):
            entry = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = entry < size
            value = tl.load(rows.value + entry, mask=inside, other=0.0)
            # Without momentum there may be anything.
            before = tl.load(target.row + entry, mask=only(inside, omega != 1.0), other=0.0)
            following = before + omega * (value - before)
            if SCHEDULE:
                best_entry = tl.load(best_row + entry, mask=only(inside, to_best), other=0.0)
                following = tl.where(to_best, best_entry, following)
                point = tl.load(point_row + entry, mask=only(inside, low), other=0.0)
                rounded = (following - point).to(tl.bfloat16)
                tl.store(rows.change + entry, rounded, mask=only(inside, low))
            replace(target, entry, inside, following)
    return ends, kind


@triton.jit(do_not_specialize=["k", "max_iter", "patience"])
def heavy_ball_kernel(
    points,
    value,  # (B, n)
    change,
    sums,
    numbers,
    flags,
    remaining,
    slot_stride,  # B n
    size,
    tiles,
    k,
    max_iter,
    patience,
    tol: tl.float32,
    atol: tl.float32,
    SCHEDULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = sample.row_of(i, flags, numbers, remaining)
    if tl.load(row.flags + sample.REQUESTED) == sample.STOPPED:
        return
    seen, status = assess(
        row=row,
        sums=sums,
        i=i,
        tiles=tiles,
        k=k,
        tol=tol,
        atol=atol,
        max_iter=max_iter,
        patience=patience,
        SLOTS=SLOTS,
        FIXED=False,
    )
    fails = seen.full & (is_finite(seen.norm) == 0)
    status = end(status, fails, seen.stalls, seen.best.meets)
    save = settle(row, seen, status, (k + 1) % SLOTS, k, SLOTS)
    if status != RUNNING:
        return
    tl.store(row.numbers + sample.NORM, seen.norm)
    _, kind = momentum_step(
        row=row,
        seen=seen,
        rows=Rows(value + i * size, points + i * size, slot_stride, change + i * size),
        save=save,
        size=size,
        k=k,
        max_iter=max_iter,
        MAY_END=False,
        SCHEDULE=SCHEDULE,
        BLOCK=BLOCK,
    )
    tl.store(row.flags + sample.REQUESTED, kind)


def advance_heavy_ball(samples: Samples, value: Tensor, k: int, options: SolveOptions) -> None:
    """After evaluation k; the next point goes to slot (k + 1) % 2 of ``samples.points``."""
    _, batch, size = samples.points.shape
    with on_device(value):
        heavy_ball_kernel[(batch,)](
            **samples.arguments(), **limits(options), value=value, k=k, **rows_tile(size)
        )


def has_momentum(options: SolveOptions) -> bool:
    """Whether a solve begins with heavy-ball steps."""
    return options.momentum or options.solver == "heavy_ball"


class MomentumSteps(Steps):
    """What the solvers that may begin with heavy-ball steps share. A solve begins with MODE at
    MOMENTUM or OPEN; low precision is for heavy-ball steps alone."""

    work_rows: ClassVar[int] = 0  # buffers (B, n) beside the values

    def __init__(self, samples: Samples, options: SolveOptions, activation: int | None):
        super().__init__(samples, options, activation)
        self.values = self.empty_rows(*samples.points.shape[1:])
        self.work = self.empty_rows(self.work_rows, *samples.points.shape[1:])

    @staticmethod
    def begins(options: SolveOptions) -> dict[str, Any]:
        mode = sample.MOMENTUM if has_momentum(options) else sample.OPEN
        return {"mode": mode.value, "radius": options.radius}

    @staticmethod
    def has_low_precision(options: SolveOptions) -> bool:
        return has_momentum(options)

    def value(self, k: int) -> Tensor:
        return self.values


class HeavyBallSteps(MomentumSteps):
    """Heavy-ball iteration."""

    def advance(self, k: int) -> None:
        advance_heavy_ball(self.samples, self.values, k, self.options)
