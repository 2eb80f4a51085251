"""The kernel of the energy solver: conjugate gradients, line search on E, verification.
Algorithm, symbols and sources: fastdeq/solvers/energy.py; the scalars of a sample and its buffers:
sample.py; passes over the rows: energy_rows.py; heavy-ball steps at the beginning: momentum.py.

Symbols: B samples of size n; z = phi(a), s = (W z + c) - a, D = phi'(a), h = D^1/2; d a direction
of conjugate gradients, r their residual, p = W h d, alpha and beta their numbers.

    direction   da += alpha p,  r -= alpha (d - h p),  d = r + beta d;  next point h d
    trial       next point phi(a + t da)
    accepted    a += t da, new s, h, r = d = h s, da = s;               next point h d

Tile layout: one program per sample, which walks its rows in pieces of BLOCK.

Bytes per sample beside sample.py's, in rows of 4 n bytes:
    direction   9 read and 4 written; the last of a step, which need not keep d and r, 7 and 2
    trial       6 read to judge it; if accepted 4 read and 6 written, else 2 and 1
    heavy ball  as in momentum.py, and 1 read and written for a of the best iterate
    and 1 read and written where a best iterate was not followed by a better one, as by directions
The first direction of a step finds d where r is and da where s is. A second pass over a row finds
it in a cache. Operations per entry: 10 in float32 and 10 in float64 for a direction, about 200 in
float32 for a trial, most of them for slope and primitive of phi, twice each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import constants
from ..launch import limits, on_device
from . import energy_rows, sample
from .judge import (
    MAX_ITER,
    RUNNING,
    assess,
    end,
    is_finite,
    settle,
)
from .momentum import SLOTS, MomentumSteps, Rows, momentum_step, target_of
from .sample import Work, rows_tile

MAX_REGISTERS = 128  # of a thread; left to itself, ptxas may take 80 and spill

_MOST_FORCING = tl.constexpr(constants.MOST_FORCING)
_FORCING_POWER = tl.constexpr(constants.FORCING_POWER)
_NEWTON_HALVINGS = tl.constexpr(constants.NEWTON_HALVINGS)
_MOST_HALVINGS = tl.constexpr(constants.MOST_HALVINGS)
_FLOOR = tl.constexpr(constants.ROUNDING_FLOOR * torch.finfo(torch.float32).eps)
_FLOOR_HALVINGS = tl.constexpr(constants.FLOOR_HALVINGS)


@triton.jit(do_not_specialize=["k", "max_iter", "patience", "most"])
def energy_kernel(
    points,
    value,  # (B, n)
    pre,
    change,
    sums,
    numbers,
    flags,
    remaining,
    work,  # (energy_rows.ROWS, B, n)
    slot_stride,  # B n, for points and for work
    size,
    tiles,
    k,
    max_iter,
    patience,
    most,  # directions of a step
    tol: tl.float32,
    atol: tl.float32,
    ACTIVATION: tl.constexpr,
    SCHEDULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = sample.row_of(i, flags, numbers, remaining)
    if tl.load(row.flags + sample.REQUESTED) == sample.STOPPED:
        return
    mode = tl.load(row.flags + sample.MODE)
    halvings = tl.load(row.flags + sample.HALVINGS)
    at_floor = tl.load(row.flags + sample.FLOOR) != 0
    rejects = tl.load(row.flags + sample.REJECTS)
    t = tl.load(row.numbers + sample.LENGTH)
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
    status = tl.where((mode == sample.DIRECTION) & (k >= max_iter), MAX_ITER, status)

    first = i * size
    rows = Rows(value + first, points + first, tl.cast(slot_stride, tl.int64), change + first)
    work = Work(work + first, rows.slot_stride, size)
    point = rows.points + (k % 2) * rows.slot_stride
    pre += first
    heavy = mode == sample.MOMENTUM
    tries = (mode == sample.TRIAL) & (status == RUNNING)
    fell = tries & (k < 0)
    if tries:
        fell = energy_rows.falls(work, t, point, pre, ACTIVATION, BLOCK)
    rejected = tries & (fell == 0)
    halvings = tl.where(rejected, halvings + 1, 0)
    stalls = halvings > tl.where(at_floor, _FLOOR_HALVINGS, _MOST_HALVINGS)
    stalls = stalls | seen.stalls
    goes_on = tries | (heavy & is_finite(seen.best.residual))
    fails = seen.full & (is_finite(seen.norm) == 0) & (goes_on == 0)
    status = end(status, fails, stalls, seen.best.meets)
    save = settle(row, seen, status, (k + 1) % 2, k, SLOTS)
    tl.store(row.flags + sample.REJECTS, rejects + rejected.to(tl.int32))
    if status != RUNNING:
        return

    if mode == sample.DIRECTION:
        target = target_of(rows.points, rows.slot_stride, k, save)
        done = energy_rows.direction(row, work, rows.value, target, most, ACTIVATION, BLOCK)
        tl.store(row.flags + sample.MODE, tl.where(done, sample.TRIAL, sample.DIRECTION))
        tl.store(row.flags + sample.REQUESTED, tl.where(done, sample.FULL, sample.PRODUCT))
        return

    opens = (mode == sample.OPEN) & (k == 0)
    kind = tl.full((), sample.FULL, tl.int32)
    if opens | (heavy & (seen.best_at == k % 2)):
        energy_rows.keep(work, pre, BLOCK)
        tl.debug_barrier()
    if heavy:
        tl.store(row.numbers + sample.NORM, seen.norm)
        opens, kind = momentum_step(
            row=row,
            seen=seen,
            rows=rows,
            save=save,
            size=size,
            k=k,
            max_iter=max_iter,
            MAY_END=True,
            SCHEDULE=SCHEDULE,
            BLOCK=BLOCK,
        )
    begins = fell | ((mode == sample.OPEN) & (opens == 0))
    left = tl.full((), 0.0, tl.float64)
    if begins:
        target = target_of(rows.points, rows.slot_stride, k, save)
        left = energy_rows.begin(work, t, fell, point, pre, target, ACTIVATION, BLOCK)
        power = tl.exp2(tl.log2(seen.relative) * _FORCING_POWER)
        forcing = tl.where(power < _MOST_FORCING, power, _MOST_FORCING)  # false for NaN
        tl.store(row.numbers + sample.ENOUGH, (forcing * forcing * left).to(tl.float32))
        tl.store(row.flags + sample.FLOOR, (seen.relative < _FLOOR).to(tl.int32))
        tl.store(row.flags + sample.DIRECTIONS, 0)
        tl.debug_barrier()
    # Where there is nothing to solve for (D = 0 everywhere), the plain step.
    directs = begins & (left > 0)
    plain = begins | (rejected & (halvings == _NEWTON_HALVINGS))
    t = tl.where(rejected & (plain == 0), 0.5 * t, 1.0)
    if opens | rejected | (begins & (directs == 0)):
        target = target_of(rows.points, rows.slot_stride, k, save & (begins == 0))
        energy_rows.attempt(work, t, plain, opens, target, ACTIVATION, BLOCK)
    following = tl.where(directs, sample.DIRECTION, tl.where(opens, sample.OPEN, sample.TRIAL))
    following = tl.where(heavy & (opens == 0), sample.MOMENTUM, following)
    tl.store(row.flags + sample.MODE, following)
    tl.store(row.flags + sample.REQUESTED, tl.where(directs, sample.PRODUCT, kind))
    tl.store(row.flags + sample.HALVINGS, halvings)
    tl.store(row.numbers + sample.LENGTH, t)


class EnergySteps(MomentumSteps):
    """The energy solver."""

    needs_pre = True
    work_rows = energy_rows.ROWS

    def advance(self, k: int) -> None:
        """After evaluation k; the next point goes to slot (k + 1) % 2 of ``samples.points``."""
        _, batch, size = self.samples.points.shape
        with on_device(self.values):
            energy_kernel[(batch,)](
                **self.samples.arguments(),
                **limits(self.options),
                value=self.values,
                pre=self.samples.pre,
                work=self.work,
                k=k,
                most=self.options.most_directions,
                ACTIVATION=self.activation,
                maxnreg=MAX_REGISTERS,
                # Up to five sums in float64 and as many rows are in registers.
                **rows_tile(size, entries=4),
            )
