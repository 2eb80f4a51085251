"""The kernel of plain steps: judges an evaluation, damps the step, requests the next evaluation.
Algorithm: fastdeq/solvers/picard.py; scalars of a sample, buffers and their bytes: sample.py.

Symbols: B samples of size n; z_k the point and f_k the value of evaluation k; beta the damping.

    z = f_k, or z_k + beta (f_k - z_k)

An evaluation writes its value to slot (k + 1) % 3 of points, where the next point belongs.

Tile layout: one program per sample, which walks its rows in pieces of BLOCK.

Bytes per sample and launch: none of size n; 8 n read and 4 n written with beta < 1. The precision
schedule: before a low-precision evaluation 8 n read and 2 n written. 4 n read and written more
where a best iterate was not followed by a better one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...solvers.solve_options import SolveOptions
from ..launch import limits, on_device
from . import sample, schedule
from .judge import RUNNING, assess, end, is_finite, only, settle
from .sample import Samples, Steps, rows_tile

SLOTS = 3  # of points
_SLOTS = tl.constexpr(SLOTS)


@triton.jit
def plain_rows(
    value_row,  # and the next point
    point_row,
    target_row,  # written by the next evaluation
    saved_row,
    best_row,
    change_row,
    size,
    damping,
    save,  # the best iterate lies at target_row
    to_best,
    low,
    DAMPED: tl.constexpr,
    SCHEDULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = entry < size
        if DAMPED or SCHEDULE:
            used = only(inside, to_best == 0 if DAMPED else low)
            value = tl.load(value_row + entry, mask=used, other=0.0)
            point = tl.load(point_row + entry, mask=used, other=0.0)
            following = point + damping * (value - point) if DAMPED else value
            if SCHEDULE:
                change = (following - point).to(tl.bfloat16)
                tl.store(change_row + entry, change, mask=only(inside, low))
                best = tl.load(best_row + entry, mask=only(inside, to_best), other=0.0)
                tl.store(value_row + entry, best, mask=only(inside, to_best))
            if DAMPED:
                tl.store(value_row + entry, following, mask=used)
        kept = tl.load(target_row + entry, mask=only(inside, save), other=0.0)
        tl.store(saved_row + entry, kept, mask=only(inside, save))


# k changes from call to call, and the limits from solve to solve: specialising on their values
# would compile anew.
@triton.jit(do_not_specialize=["k", "max_iter", "patience"])
def plain_kernel(
    points,
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
    damping: tl.float32,
    DAMPED: tl.constexpr,
    SCHEDULE: tl.constexpr,
    FIXED: tl.constexpr,
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
        SLOTS=_SLOTS,
        FIXED=FIXED,
    )
    finite = is_finite(seen.norm)
    status = end(status, seen.full & (finite == 0), seen.stalls, seen.best.meets)
    to_best = (seen.full | finite) == 0  # perhaps rounding is to blame
    _, kind = schedule.after_plain_step(row, seen, to_best, k, max_iter, SCHEDULE)
    target = (k + 2) % _SLOTS
    save = settle(row, seen, status, target, k, _SLOTS)
    if status != RUNNING:
        return
    tl.store(row.numbers + sample.NORM, seen.norm)
    tl.store(row.flags + sample.REQUESTED, kind)
    low = kind == sample.LOW
    points += i * size
    moves = save | to_best | low
    if k >= 0 if DAMPED else moves:
        plain_rows(
            value_row=points + ((k + 1) % _SLOTS).to(tl.int64) * slot_stride,
            point_row=points + (k % _SLOTS).to(tl.int64) * slot_stride,
            target_row=points + target.to(tl.int64) * slot_stride,
            saved_row=points + (target * 0 + _SLOTS).to(tl.int64) * slot_stride,
            best_row=points + seen.best_at.to(tl.int64) * slot_stride,
            change_row=change + i * size,
            size=size,
            damping=damping,
            save=save,
            to_best=to_best,
            low=low,
            DAMPED=DAMPED,
            SCHEDULE=SCHEDULE,
            BLOCK=BLOCK,
        )


def advance_plain(samples: Samples, k: int, options: SolveOptions) -> None:
    """After evaluation k, whose value lies in slot (k + 1) % 3 of ``samples.points``."""
    _, batch, size = samples.points.shape
    with on_device(samples.points):
        plain_kernel[(batch,)](
            **samples.arguments(),
            **limits(options),
            k=k,
            damping=options.damping,
            DAMPED=options.damping != 1.0,
            FIXED=options.fixed_iterations > 0,
            **rows_tile(size),
        )


class PlainSteps(Steps):
    """Picard and Neumann iteration."""

    slots = SLOTS

    def value(self, k: int) -> Tensor:
        return self.samples.points[(k + 1) % SLOTS]

    def advance(self, k: int) -> None:
        advance_plain(self.samples, k, self.options)
