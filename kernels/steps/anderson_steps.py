"""The kernel of Anderson acceleration: judges an evaluation, finds the weights, mixes, and requests
the next one; for one sample in one program. Algorithm: fastdeq/solvers/anderson.py; scalars of a
sample, buffers and their bytes: sample.py.

Symbols: B samples of size n; z_k the point, f_k the value and g_k = f_k - z_k of evaluation k; m
entries of history, evaluation k at place k % m; c in use beside the newest, the last c ones;
p = m - 1 and P the next power of two; beta the damping; ``points`` has two slots in turn.

    z = f_k - sum gamma_i (f_k - f_i) - (1 - beta) (g_k - sum gamma_i (g_k - g_i))
    z = f_{k-1}                  where z_k came from a mix and |g_k| is too large: taken back
    z = z_k + beta (f_k - z_k)   before the acceleration begins

Tile layout: tiles of (P, BLOCK), older entries as rows, newest first. The weights are those of
anderson_weights.py. The step kernel writes f_k to the history, and g_k for a sample with HISTORY;
where the acceleration only begins g_k is written here.

Bytes per sample and launch: 4 (c + 1) n of g and 4 (c + 1) n of f read (with beta < 1 again 4 c n
of g and 4 n of z_k), 4 n written, 8 c^2 + 8 c of the Gram matrix read, 16 c written; entries of the
history that are not in use are not read. Before the acceleration begins 4 n read and written. The
precision schedule: 4 n read and 2 n written before a low-precision evaluation. 4 n read and written
more where a best iterate was not followed by a better one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...solvers.solve_options import SolveOptions
from ..anderson_mix import MAX_CAPACITY, tile_shape
from ..anderson_weights import mixing_weights, older_entries
from ..launch import limits, on_device, window_of
from . import sample, schedule
from .anderson_rows import mix_rows, write_residual
from .judge import RUNNING, assess, end, is_finite, settle
from .momentum import target_of
from .sample import Samples, Steps

SLOTS = 2  # of points
# Registers of a thread, by warps. Left to itself ptxas spills a few to fit one more program.
REGISTERS = {4: 168, 8: 168, 16: 128}
_SLOTS = tl.constexpr(SLOTS)


@triton.jit(do_not_specialize=["k", "max_iter", "patience"])
def anderson_kernel(
    points,
    f_history,
    g_history,
    gram,
    change,
    sums,
    numbers,
    flags,
    remaining,
    slot_stride,  # B n
    size,
    tiles,
    capacity,  # m
    k,
    max_iter,
    patience,
    tol: tl.float32,
    atol: tl.float32,
    undamped: tl.float32,  # 1 - beta
    regularization: tl.float64,
    rank_tolerance: tl.float64,
    max_weight: tl.float64,
    safeguard: tl.float32,
    accelerate_above: tl.float32,
    DAMPED: tl.constexpr,
    SCHEDULE: tl.constexpr,
    COLUMNS: tl.constexpr,  # P
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = sample.row_of(i, flags, numbers, remaining)
    if tl.load(row.flags + sample.REQUESTED) == sample.STOPPED:
        return
    plain = tl.load(row.flags + sample.PLAIN) != 0
    accelerated = tl.load(row.flags + sample.ACCELERATED) != 0
    refills = tl.load(row.flags + sample.REFILLS) != 0
    count = tl.load(row.flags + sample.COUNT)
    written = tl.load(row.flags + sample.HISTORY)
    backs = tl.load(row.flags + sample.REJECTS)
    caps = tl.load(row.flags + sample.REJECTS + 1)
    cuts = tl.load(row.flags + sample.REJECTS + 2)
    trusted_norm = tl.load(row.numbers + sample.TRUSTED_NORM)
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
        FIXED=False,
    )
    finite, slow = is_finite(seen.norm), (seen.norm <= accelerate_above * seen.previous) == 0
    to_best = (seen.full | finite | accelerated) == 0  # perhaps rounding is to blame
    if SCHEDULE:
        was_full = tl.load(row.flags + sample.SINCE_FULL) == 0
        clear = schedule.clear_of_goal(row, seen.relative)
        plain = plain & ((seen.full & was_full & slow) == 0)
        # A history begins with a full-precision evaluation, if need be the one after this.
        begins = plain & (seen.full == 0) & (to_best == 0) & clear & slow
        last_full, goal, since, lowest = schedule.after_evaluation(row, seen, plain)
        lowest = tl.where(to_best, sample.FULL, lowest)
        goal = tl.where(begins, float("inf"), goal)
        stays_plain = plain & (begins == 0)
    else:
        plain = plain & (slow == 0)
        stays_plain = plain

    # NaN compares false: "not (norm <= limit)" takes a step back that is not finite as well.
    accelerates = (plain | to_best) == 0
    back = accelerates & accelerated & ((seen.norm <= safeguard * trusted_norm) == 0)
    takes_back = back & (status == RUNNING)
    fails = seen.full & ((finite | back) == 0)
    status = end(status, fails, seen.stalls, seen.best.meets)
    save = settle(row, seen, status, (k + 1) % _SLOTS, k, _SLOTS)
    tl.store(row.flags + sample.REJECTS, backs + takes_back.to(tl.int32))
    if status != RUNNING:
        return

    mixes = accelerates & (back == 0)
    next_count = tl.where(
        mixes, tl.minimum(count + 1, capacity - 1), tl.where(back | to_best, 0, count)
    )
    tl.store(row.flags + sample.COUNT, next_count)
    still_refills = refills & ((mixes == 0) | (next_count < capacity - 1))
    tl.store(row.flags + sample.REFILLS, (back | still_refills).to(tl.int32))
    tl.store(row.flags + sample.PLAIN, stays_plain.to(tl.int32))
    tl.store(row.flags + sample.HISTORY, (stays_plain == 0).to(tl.int32))
    tl.store(row.numbers + sample.NORM, seen.norm)
    kind = tl.full((), sample.FULL, tl.int32)
    if SCHEDULE:
        schedule.store(row, last_full, goal, since, lowest)
        kind = schedule.next_kind(
            seen=seen,
            plain=stays_plain,
            since_full=since,
            last_full=last_full,
            goal=goal,
            lowest=lowest,
            count=next_count,
            k=k,
            max_iter=max_iter,
        )
    tl.store(row.flags + sample.REQUESTED, kind)
    low = kind == sample.LOW

    newest = (k % capacity).to(tl.int64)
    older = older_entries(newest, capacity, COLUMNS)
    f_rows = f_history + i * capacity * size
    g_rows = g_history + i * capacity * size
    value_row = f_rows + newest * size
    point_row = points + (k % _SLOTS).to(tl.int64) * slot_stride + i * size
    gamma = tl.zeros((COLUMNS,), tl.float64)
    if mixes:
        if written == 0:
            write_residual(point_row, value_row, g_rows + newest * size, size, BLOCK)
            tl.debug_barrier()  # other threads read it
        one = tl.arange(0, 1)  # the only sample of this program
        weights, kept, accepted = mixing_weights(
            newest_g=g_rows + newest * size + one,
            older_g=(g_rows + older * size)[None, :],
            gram=gram + i * capacity * capacity + one,
            stride_row=capacity,
            stride_column=1,
            newest=newest,
            older=older,
            used=(tl.arange(0, COLUMNS) < count)[None, :],
            valid=one + count,
            size=size,
            stride_entry=1,
            regularization=regularization,
            rank_tolerance=rank_tolerance,
            max_weight=max_weight,
            BLOCK=BLOCK,
        )
        gamma = tl.where(refills, 0.0, tl.sum(weights, axis=0))
        rejected = (tl.max(accepted.to(tl.int32), axis=0) == 0) & (refills == 0)
        dropped = (tl.sum(kept, axis=0) < count) & (refills == 0)
        tl.store(row.flags + sample.REJECTS + 1, caps + rejected.to(tl.int32))
        tl.store(row.flags + sample.REJECTS + 2, cuts + dropped.to(tl.int32))
        mixed = (rejected | refills) == 0
        tl.store(row.flags + sample.ACCELERATED, (mixed & (count > 0)).to(tl.int32))
        tl.store(row.numbers + sample.TRUSTED_NORM, seen.norm)
    else:
        tl.store(row.flags + sample.ACCELERATED, (accelerated & (back == 0)).to(tl.int32))

    mix_rows(
        f_rows=f_rows,
        g_rows=g_rows,
        newest=newest,
        before=tl.where(newest > 0, newest - 1, capacity - 1),
        older=older,
        point_row=point_row,
        best_row=points + seen.best_at.to(tl.int64) * slot_stride + i * size,
        next_point=target_of(points + i * size, slot_stride, k, save),
        change_row=change + i * size,
        weight=gamma.to(tl.float32)[:, None],
        back=back,
        to_best=to_best,
        low=low,
        undamped=undamped,
        size=size,
        DAMPED=DAMPED,
        SCHEDULE=SCHEDULE,
        BLOCK=BLOCK,
    )


@dataclass(frozen=True)
class History:
    """Values and residuals ``(B, m, n)``, their Gram matrix ``(B, m, m)`` float64; all unset."""

    f: Tensor
    g: Tensor
    gram: Tensor


def advance_anderson(samples: Samples, history: History, k: int, options: SolveOptions) -> None:
    """After evaluation k, whose value lies at place k % m of the history; the next point goes to
    slot (k + 1) % 2 of ``samples.points``."""
    batch, capacity, size = history.f.shape
    columns, block, warps = tile_shape(capacity, size)
    with on_device(history.f):
        anderson_kernel[(batch,)](
            **samples.arguments(),
            **limits(options),
            f_history=history.f,
            g_history=history.g,
            gram=history.gram,
            capacity=capacity,
            k=k,
            undamped=1.0 - options.damping,
            regularization=options.regularization,
            rank_tolerance=options.rank_tolerance,
            max_weight=options.max_weight,
            safeguard=options.safeguard,
            accelerate_above=options.accelerate_above,
            DAMPED=options.damping != 1.0,
            COLUMNS=columns,
            BLOCK=block,
            num_warps=warps,
            maxnreg=REGISTERS[warps],
        )


class AndersonSteps(Steps):
    """Anderson acceleration."""

    slots = SLOTS

    def __init__(self, samples: Samples, options: SolveOptions, activation: int | None):
        super().__init__(samples, options, activation)
        _, batch, size = samples.points.shape
        entries = window_of(options) + 1
        self.history = History(
            f=self.empty_rows(batch, entries, size),
            g=self.empty_rows(batch, entries, size),
            gram=self.empty_rows(batch, entries, entries, dtype=torch.float64),
        )
        self.entries = entries

    @staticmethod
    def why_not(options: SolveOptions) -> str:
        if window_of(options) < MAX_CAPACITY:
            return ""
        return f"its Anderson window is at most {MAX_CAPACITY - 1}, not {options.window}"

    @staticmethod
    def begins(options: SolveOptions) -> dict[str, Any]:
        return {"plain": options.accelerate_above > 0}

    def value(self, k: int) -> Tensor:
        return self.history.f[:, k % self.entries]

    def residual(self, k: int) -> Tensor | None:
        return self.history.g[:, k % self.entries]

    def advance(self, k: int) -> None:
        advance_anderson(self.samples, self.history, k, self.options)
