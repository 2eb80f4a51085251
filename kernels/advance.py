"""Advance kernels of plain and heavy-ball steps: they judge an evaluation, take the solver's step
and say how the next evaluation is made. Algorithms: fastdeq/solvers/, with the ramp as in
csrc/cpu/ramp.h; the scalars of a sample, its buffers and their bytes: sample.py.

Symbols: B samples of size n; z_k the point and f_k the value of evaluation k; P slots of points;
beta the damping.

    plain       z = f_k, or z_k + beta (f_k - z_k)          P = 3
    heavy ball  z = z_{k-1} + omega (f_k - z_{k-1})         P = 2

An evaluation of a plain solve writes its value to slot (k + 1) % P, where the next point belongs.

Tile layout: one program per sample, which walks its rows in pieces of BLOCK.

Bytes per sample and launch:
    plain       none of size n; 8 n read and 4 n written with beta < 1
    heavy ball  8 n read and 4 n written
    the ramp    before a narrow evaluation 8 n (heavy ball 4 n) read and 2 n written
    4 n read and written more where a best iterate was not followed by a better one

Compared with fastdeq/solvers/ by Triton's interpreter; compiled for sm_80 and sm_90. No GPU has run
them: block sizes and warp counts are choices, not measurements.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sample
from .sample import Limits, Samples

PLAIN_SLOTS = 3
HEAVY_BALL_SLOTS = 2


@triton.jit
def reanchor(numbers_row, flags_row, exact, relative, plain, tol):
    """The ramp's columns after an evaluation: (ANCHOR, GOAL, SINCE_ANCHOR, NARROWEST). One that is
    exact for the sake of other samples comes too early to judge narrow ones by."""
    asked = tl.load(flags_row + sample.WANTED) == sample.EXACT
    before = tl.load(numbers_row + sample.ANCHOR)
    goal = tl.load(numbers_row + sample.GOAL)
    since = tl.load(flags_row + sample.SINCE_ANCHOR)
    narrowest = tl.load(flags_row + sample.NARROWEST)
    made = tl.where(asked, since, 0)
    next_goal, allowed = sample.anchor(relative, before, goal, made, narrowest, plain, tol)
    return (
        tl.where(exact, relative, before),
        tl.where(exact, next_goal, goal),
        tl.where(exact, 0, since + 1),
        tl.where(exact, allowed, narrowest),
    )


@triton.jit
def store_ramp(numbers_row, flags_row, before, goal, since, narrowest):
    tl.store(numbers_row + sample.ANCHOR, before)
    tl.store(numbers_row + sample.GOAL, goal)
    tl.store(flags_row + sample.SINCE_ANCHOR, since)
    tl.store(flags_row + sample.NARROWEST, narrowest)


@triton.jit
def momentum(numbers_row, flags_row, norm, previous, k, trusted, back):
    """Heavy ball: (omega of the step to take, whether the residual does not halve in time); stores
    the columns of the method. ``back``: the next point is the best one, and momentum is lost."""
    norm_1 = tl.load(numbers_row + sample.NORM_1)
    norm_2 = tl.load(numbers_row + sample.NORM_2)
    radius = tl.load(numbers_row + sample.RADIUS)
    led = tl.load(numbers_row + sample.LED)
    omega = tl.load(numbers_row + sample.OMEGA)
    mark = tl.load(numbers_row + sample.MARK)
    since = tl.load(flags_row + sample.SINCE)
    next_radius, next_led, next_omega, next_mark, next_since, slow = sample.learn(
        norm, previous, norm_1, norm_2, radius, led, omega, mark, since, k, trusted
    )
    tl.debug_barrier()
    tl.store(numbers_row + sample.NORM_1, tl.where(back, norm_1, previous))
    tl.store(numbers_row + sample.NORM_2, tl.where(back, norm_2, norm_1))
    tl.store(numbers_row + sample.RADIUS, tl.where(back, radius, next_radius))
    tl.store(numbers_row + sample.LED, tl.where(back, led, next_led))
    tl.store(numbers_row + sample.OMEGA, tl.where(back, 1.0, next_omega))
    tl.store(numbers_row + sample.MARK, tl.where(back, mark, next_mark))
    tl.store(flags_row + sample.SINCE, tl.where(back, since, next_since))
    return omega, slow & (back == 0)


@triton.jit
def momentum_rows(
    value_row,
    point_row,
    target_row,  # the point before, and the next one
    saved_row,
    best_row,
    change_row,
    size,
    omega,
    save,  # the best iterate lies at target_row
    back,
    narrow,
    RAMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The next point of a heavy-ball step and, for a narrow evaluation, the change."""
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = entry < size
        value = tl.load(value_row + entry, mask=inside, other=0.0)
        # Without momentum there may be anything.
        before = tl.load(target_row + entry, mask=sample.only(inside, omega != 1.0), other=0.0)
        following = before + omega * (value - before)
        if RAMP:
            best = tl.load(best_row + entry, mask=sample.only(inside, back), other=0.0)
            following = tl.where(back, best, following)
            point = tl.load(point_row + entry, mask=sample.only(inside, narrow), other=0.0)
            change = (following - point).to(tl.bfloat16)
            tl.store(change_row + entry, change, mask=sample.only(inside, narrow))
        sample.replace(target_row, saved_row, entry, inside, save, following)


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
    save,
    back,
    narrow,
    DAMPED: tl.constexpr,
    RAMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = entry < size
        if DAMPED or RAMP:
            used = sample.only(inside, back == 0 if DAMPED else narrow)
            value = tl.load(value_row + entry, mask=used, other=0.0)
            point = tl.load(point_row + entry, mask=used, other=0.0)
            following = point + damping * (value - point) if DAMPED else value
            if RAMP:
                change = (following - point).to(tl.bfloat16)
                tl.store(change_row + entry, change, mask=sample.only(inside, narrow))
                best = tl.load(best_row + entry, mask=sample.only(inside, back), other=0.0)
                tl.store(value_row + entry, best, mask=sample.only(inside, back))
            if DAMPED:
                tl.store(value_row + entry, following, mask=used)
        kept = tl.load(target_row + entry, mask=sample.only(inside, save), other=0.0)
        tl.store(saved_row + entry, kept, mask=sample.only(inside, save))


# k changes from call to call, and the limits from solve to solve: specialising on their values
# would compile anew.
@triton.jit(do_not_specialize=["k", "max_iter", "patience"])
def advance_kernel(
    points,
    value,  # (B, n); unused by plain steps
    change,
    sums,
    numbers,
    flags,
    remaining,
    slot,  # B n, from one slot of points to the next
    size,
    tiles,
    k,
    max_iter,
    patience,
    tol: tl.float32,
    damping: tl.float32,
    HEAVY: tl.constexpr,
    DAMPED: tl.constexpr,
    RAMP: tl.constexpr,
    FIXED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    flags_row = flags + i * sample.FLAGS
    numbers_row = numbers + i * sample.NUMBERS
    if tl.load(flags_row + sample.WANTED) == sample.STOPPED:
        return
    exact = tl.load(flags_row + sample.MADE) == sample.EXACT
    previous = tl.load(numbers_row + sample.NORM)
    norm, relative = sample.measure(sums, i, tiles)
    best, idle, best_at, status = sample.assess(
        numbers_row, flags_row, exact, relative, k, tol, max_iter, SLOTS, FIXED
    )
    finite = sample.is_finite(norm)
    fails = exact & (finite == 0)
    status = tl.where((status == sample.RUNNING) & fails, sample.failure(best, tol), status)
    idles = exact & sample.out_of_patience(idle, k, patience, FIXED)
    status = tl.where((status == sample.RUNNING) & idles, sample.STAGNATED, status)
    target = (k + 1) % SLOTS if HEAVY else (k + 2) % SLOTS
    save = best_at == target
    back = (exact | finite) == 0  # perhaps rounding is to blame: to the best point, exactly
    wanted = tl.full((), sample.EXACT, tl.int32)
    trusted = exact
    if RAMP:
        # Nearer to the goal the rounding hides how fast the residual falls.
        was_exact = tl.load(flags_row + sample.SINCE_ANCHOR) == 0
        clear = relative > 1.5 * tl.load(numbers_row + sample.GOAL)
        trusted = tl.where(exact, was_exact, clear)
        before, goal, since, narrowest = reanchor(numbers_row, flags_row, exact, relative, 1, tol)
        narrowest = tl.where(back, sample.EXACT, narrowest)
        wanted = sample.next_kind(
            relative, norm, previous, 1, since, before, goal, narrowest, 0, k, max_iter
        )
    narrow = wanted == sample.NARROW
    tl.debug_barrier()
    tl.store(numbers_row + sample.BEST, best)
    tl.store(flags_row + sample.IDLE, idle)
    if status != sample.RUNNING:
        tl.store(flags_row + sample.BEST_AT, best_at)
        sample.stop(flags_row, remaining, status, k)
        return
    tl.store(flags_row + sample.BEST_AT, tl.where(save, SLOTS, best_at))
    tl.store(numbers_row + sample.NORM, norm)
    tl.store(flags_row + sample.WANTED, wanted)
    if RAMP:
        store_ramp(numbers_row, flags_row, before, goal, since, narrowest)

    row = i * size
    points += row
    value_row = value + row if HEAVY else points + ((k + 1) % SLOTS).to(tl.int64) * slot
    point_row = points + (k % SLOTS).to(tl.int64) * slot
    target_row = points + target.to(tl.int64) * slot
    best_row = points + best_at.to(tl.int64) * slot
    saved_row = points + (target * 0 + SLOTS).to(tl.int64) * slot
    change_row = change + row
    if HEAVY:
        omega, _ = momentum(numbers_row, flags_row, norm, previous, k, trusted, back)
        momentum_rows(
            *(value_row, point_row, target_row, saved_row, best_row, change_row),
            *(size, omega, save, back, narrow, RAMP, BLOCK),
        )
    else:
        moves = save | back | narrow
        if k >= 0 if DAMPED else moves:
            plain_rows(
                *(value_row, point_row, target_row, saved_row, best_row, change_row),
                *(size, damping, save, back, narrow, DAMPED, RAMP, BLOCK),
            )


def block_of(size: int) -> tuple[int, int]:
    """(BLOCK, number of warps) for rows of size n."""
    block = max(32, min(1024, triton.next_power_of_2(size)))
    return block, max(1, block // 256)


def on_device(t: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device_of(t) if t.is_cuda else nullcontext()


def _advance(
    samples: Samples, value: Tensor, k: int, limits: Limits, damping: float, heavy: bool
) -> None:
    _, batch, size = samples.points.shape
    block, warps = block_of(size)
    with on_device(value):
        advance_kernel[(batch,)](
            samples.points,
            value,
            value if samples.change is None else samples.change,
            samples.sums,
            samples.numbers,
            samples.flags,
            samples.remaining,
            *(batch * size, size, samples.sums.shape[1]),
            *(k, limits.max_iter, limits.patience, limits.tol, damping),
            HEAVY=heavy,
            DAMPED=damping != 1.0,
            RAMP=samples.change is not None,
            FIXED=limits.fixed,
            SLOTS=samples.slots,
            BLOCK=block,
            num_warps=warps,
        )


def advance_plain(samples: Samples, k: int, limits: Limits, damping: float = 1.0) -> None:
    """After evaluation k, whose value lies in slot (k + 1) % 3 of ``samples.points``."""
    _advance(samples, samples.points, k, limits, damping, heavy=False)


def advance_heavy_ball(samples: Samples, value: Tensor, k: int, limits: Limits) -> None:
    """After evaluation k; the next point goes to slot (k + 1) % 2 of ``samples.points``."""
    _advance(samples, value, k, limits, 1.0, heavy=True)
