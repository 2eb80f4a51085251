"""The kernel of MINRES: Lanczos vectors with their rotations, verification, restarts. Algorithm,
symbols and sources: fastdeq/solvers/minres.py; the scalars of a sample and its buffers: sample.py;
passes over the rows: minres_rows.py; heavy-ball steps at the beginning: momentum.py.

Symbols: B samples of size n, q = h v with h = D^1/2, A = I - h W h, v = v_0 + x.

    direction   u = A y - alpha y - b y_old,  w = (y - corner w_old - upper w) / length,
                x += tau w, y_old = y, y = u / beta;    next point h y
    verified    next point h (v_0 + x)
    anew        v_0 += x, y = h (g + q W) - v_0, scaled;    next point h y

Tile layout: one program per sample, which walks its rows in pieces of BLOCK.

Bytes per sample beside sample.py's, in rows of 4 n bytes:
    direction   12 read and 4 written; 3 and 1 more before a verification
    verified    2 read and 1 written to go on; 6 and 4 to begin anew
    heavy ball  as in momentum.py, and 2 read and 1 written for v_0 of the best iterate
    and 1 read and written where a best iterate was not followed by a better one, as by directions
A second pass over a row finds it in a cache. Operations per entry and direction: 25 in float32, two
roots among them, and 14 in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import constants
from ..launch import limits, on_device
from . import minres_rows, sample
from .judge import (
    MAX_ITER,
    RUNNING,
    assess,
    end,
    is_finite,
    replace,
    settle,
)
from .momentum import SLOTS, MomentumSteps, Rows, momentum_step, target_of
from .sample import Work, rows_tile

MAX_REGISTERS = 128  # of a thread; left to itself, ptxas may take 80 and spill

_ESTIMATE_FRACTION = tl.constexpr(constants.ESTIMATE_FRACTION)
_DRIFT = tl.constexpr(constants.DRIFT)
_MOST_VAIN_RESTARTS = tl.constexpr(constants.MOST_VAIN_RESTARTS)


@triton.jit(do_not_specialize=["k", "max_iter", "patience"])
def minres_kernel(
    points,
    value,  # (B, n)
    pre,
    slope,  # D
    change,
    sums,
    numbers,
    flags,
    remaining,
    work,  # (minres_rows.ROWS, B, n)
    slot_stride,  # B n, for points and for work
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
    mode = tl.load(row.flags + sample.MODE)
    exhausted = tl.load(row.flags + sample.EXHAUSTED) != 0
    vain = tl.load(row.flags + sample.VAIN_RESTARTS)
    rejects = tl.load(row.flags + sample.REJECTS)
    directions = tl.load(row.flags + sample.DIRECTIONS)
    restarted_at = tl.load(row.numbers + sample.RESTARTED_AT)
    phi = tl.load(row.numbers + sample.PHI)
    aim = tl.load(row.numbers + sample.AIM)
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
    pre += first
    slope += first
    last = k + 1 >= max_iter
    heavy = mode == sample.MOMENTUM
    fails = seen.full & (is_finite(seen.norm) == 0) & ((heavy & is_finite(seen.best.residual)) == 0)
    verified = (mode == sample.TRIAL) & (last == 0)
    drifts = (seen.norm <= phi * _DRIFT) == 0
    anew = (verified & (exhausted | drifts)) | ((mode == sample.OPEN) & (last == 0))
    anew = anew & (fails == 0) & (status == RUNNING)
    restarts = anew & verified
    gains = restarts & (seen.norm < 0.5 * restarted_at)
    vain = tl.where(gains, 0, vain + restarts.to(tl.int32))
    square = tl.full((), 1.0, tl.float64)
    if anew:
        square = minres_rows.begin(work, slope, directions, k > 0, pre, BLOCK)
    length = tl.sqrt(square)
    # A residual of zero that does not meet the tolerance is one below the smallest number.
    stalls = anew & ((vain > _MOST_VAIN_RESTARTS) | ((length > 0) == 0))
    stalls = stalls | seen.stalls
    status = end(status, fails, stalls, seen.best.meets)
    save = settle(row, seen, status, (k + 1) % 2, k, SLOTS)
    tl.store(row.flags + sample.REJECTS, rejects + restarts.to(tl.int32))
    if status != RUNNING:
        return

    target = target_of(rows.points, rows.slot_stride, k, save)
    if mode == sample.DIRECTION:
        done = minres_rows.direction(row, work, slope, rows.value, target, last, tol, atol, BLOCK)
        tl.store(row.flags + sample.MODE, tl.where(done, sample.TRIAL, sample.DIRECTION))
        tl.store(row.flags + sample.REQUESTED, tl.where(done, sample.FULL, sample.PRODUCT))
        return

    following = tl.full((), sample.DIRECTION, tl.int32)
    kind = tl.full((), sample.PRODUCT, tl.int32)
    if heavy:
        if seen.best_at == k % 2:
            minres_rows.keep(work, slope, pre, BLOCK)
            tl.debug_barrier()
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
        if opens:
            minres_rows.iterate(work, slope, 0, target, BLOCK)
        following = tl.where(opens, sample.OPEN, sample.MOMENTUM)
    elif last:  # the plain step is all that is left
        for start in range(0, size, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            inside = entry < size
            plain = tl.load(rows.value + entry, mask=inside, other=0.0)
            replace(target, entry, inside, plain)
        following = tl.full((), sample.TRIAL, tl.int32)
        kind = tl.full((), sample.FULL, tl.int32)
    else:
        directions = tl.where(anew, 0, directions)
        scale = tl.where(anew, 1 / length, 1.0).to(tl.float32)
        minres_rows.aim_along(work, slope, directions, scale, target, BLOCK)
        tl.store(row.flags + sample.DIRECTIONS, directions)
        # Where the estimate is sound, on towards a lower one.
        lower = seen.limit / seen.relative
        aim *= tl.where(lower < 1, lower, 1.0) * _ESTIMATE_FRACTION
        tl.store(row.numbers + sample.AIM, tl.where(anew, _ESTIMATE_FRACTION, aim))
        if anew:
            tl.store(row.flags + sample.VAIN_RESTARTS, vain)
            tl.store(row.flags + sample.EXHAUSTED, 0)
            tl.store(row.numbers + sample.RESTARTED_AT, tl.where(gains, seen.norm, restarted_at))
            tl.store(row.numbers + sample.BETA, 0.0)
            tl.store(row.numbers + sample.SINE, 0.0)
            tl.store(row.numbers + sample.DIAGONAL, 0.0)
            tl.store(row.numbers + sample.CORNER, 0.0)
            tl.store(row.numbers + sample.COSINE, -1.0)
            tl.store(row.numbers + sample.PHI, length.to(tl.float32))
    tl.store(row.flags + sample.MODE, following)
    tl.store(row.flags + sample.REQUESTED, kind)


class MinresSteps(MomentumSteps):
    """MINRES, of an adjoint; a solve begins at zero."""

    needs_pre = True
    work_rows = minres_rows.ROWS

    def advance(self, k: int) -> None:
        """After evaluation k; the next point goes to slot (k + 1) % 2 of ``samples.points``."""
        _, batch, size = self.samples.points.shape
        with on_device(self.values):
            minres_kernel[(batch,)](
                **self.samples.arguments(),
                **limits(self.options),
                value=self.values,
                pre=self.samples.pre,
                slope=self.samples.slope,
                work=self.work,
                k=k,
                maxnreg=MAX_REGISTERS,
                # Up to six sums in float64 and eight rows are in registers.
                **rows_tile(size, entries=4),
            )
