"""The advance kernel of MINRES: Lanczos vectors with their rotations, verification, restarts.
Algorithm, symbols and sources: fastdeq/solvers/minres.py; the scalars of a sample and its buffers:
sample.py; passes over the rows: minres_rows.py; heavy-ball steps at the beginning: advance.py.

Symbols: B samples of size n, q = h v with h = D^1/2, A = I - h W h, v = v_0 + x.

    direction   u = A y - alpha y - b y_old,  w = (y - corner w_old - upper w) / length,
                x += tau w, y_old = y, y = u / beta;    next point h y
    verified    next point h (v_0 + x)
    anew        v_0 += x, y = h (g + q W) - v_0, scaled;    next point h y

Tile layout: one program per sample, which walks its rows in pieces of BLOCK.

Bytes per sample beside sample.py's, in rows of 4 n bytes:
    direction   12 read and 4 written; 3 and 1 more before a verification
    verified    2 read and 1 written to go on; 6 and 4 to begin anew
    heavy ball  as in advance.py, and 2 read and 1 written for v_0 of the best iterate
    and 1 read and written where a best iterate was not followed by a better one, as by directions
A second pass over a row finds it in a cache. Operations per entry and direction: 25 in float32, two
roots among them, and 14 in float64.

Compared with fastdeq/solvers/minres.py by Triton's interpreter on a CPU; compiled for sm_80 and
sm_90. No GPU has run it: block sizes and warp counts are choices, not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import advance, minres_rows, sample
from .hand_over import momentum_step
from .sample import Limits, Samples

SLOTS = 2  # of points
ROWS = minres_rows.ROWS
MAX_REGISTERS = 128  # of a thread; left to itself, ptxas may take 80 and spill

# As in fastdeq/solvers/minres.py.
_AIM = tl.constexpr(0.9)
_DRIFT = tl.constexpr(4.0)
_MOST_VAIN = tl.constexpr(2)
_SLOTS = tl.constexpr(SLOTS)


# k changes from call to call, and the limits from solve to solve: specialising on their values
# would compile anew.
@triton.jit(do_not_specialize=["k", "max_iter", "patience"])
def advance_minres_kernel(
    points,
    value,  # (B, n)
    pre,
    slope,  # D
    change,
    sums,
    numbers,
    flags,
    remaining,
    work,
    slot,  # B n, from one slot of points, or row of work, to the next
    size,
    tiles,
    k,
    max_iter,
    patience,
    tol: tl.float32,
    RAMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    flags_row = flags + i * sample.FLAGS
    numbers_row = numbers + i * sample.NUMBERS
    if tl.load(flags_row + sample.WANTED) == sample.STOPPED:
        return
    mode = tl.load(flags_row + sample.MODE)
    exact = tl.load(flags_row + sample.MADE) == sample.EXACT
    exhausted = tl.load(flags_row + sample.EXHAUSTED) != 0
    vain = tl.load(flags_row + sample.VAIN)
    rejects = tl.load(flags_row + sample.REJECTS)
    made = tl.load(flags_row + sample.DIRECTIONS)
    restarted_at = tl.load(numbers_row + sample.RESTARTED_AT)
    phi = tl.load(numbers_row + sample.PHI)
    aim = tl.load(numbers_row + sample.AIM)
    previous = tl.load(numbers_row + sample.NORM)
    norm, relative = sample.measure(sums, i, tiles)  # of no use after a direction
    best, idle, best_at, status = sample.assess(
        numbers_row, flags_row, exact, relative, k, tol, max_iter, _SLOTS, False
    )
    limit = tl.where(best <= tol, sample.CONVERGED, sample.MAX_ITER)
    status = tl.where((mode == sample.DIRECTION) & (k >= max_iter), limit, status)

    plane = tl.cast(slot, tl.int64)
    row = i * size
    points += row
    target = points + ((k + 1) % 2) * plane
    saved = points + 2 * plane
    work += row
    value += row
    pre += row
    slope += row
    last = k + 1 >= max_iter
    heavy = mode == sample.MOMENTUM
    fails = exact & (sample.is_finite(norm) == 0) & ((heavy & sample.is_finite(best)) == 0)
    verified = (mode == sample.TRIAL) & (last == 0)
    drifts = (norm <= phi * _DRIFT) == 0
    anew = (verified & (exhausted | drifts)) | ((mode == sample.OPEN) & (last == 0))
    anew = anew & (fails == 0) & (status == sample.RUNNING)
    restarts = anew & verified
    gains = restarts & (norm < 0.5 * restarted_at)
    vain = tl.where(gains, 0, vain + restarts.to(tl.int32))
    square = tl.full((), 1.0, tl.float64)
    if anew:
        square = minres_rows.begin(work, plane, slope, made, k > 0, pre, size, BLOCK)
    length = tl.sqrt(square)
    # A residual of zero that does not meet the tolerance is one below the smallest number.
    stalls = (anew & ((vain > _MOST_VAIN) | ((length > 0) == 0))) | (
        exact & sample.out_of_patience(idle, k, patience, False)
    )
    ends = tl.where(fails, sample.failure(best, tol), sample.STAGNATED)
    status = tl.where((status == sample.RUNNING) & (fails | stalls), ends, status)

    # All threads have loaded what one of them stores from here on.
    tl.debug_barrier()
    tl.store(numbers_row + sample.BEST, best)
    tl.store(flags_row + sample.IDLE, idle)
    tl.store(flags_row + sample.REJECTS, rejects + restarts.to(tl.int32))
    if status != sample.RUNNING:
        tl.store(flags_row + sample.BEST_AT, best_at)
        sample.stop(flags_row, remaining, status, k)
        return
    save = best_at == (k + 1) % 2
    tl.store(flags_row + sample.BEST_AT, tl.where(save, _SLOTS, best_at))

    if mode == sample.DIRECTION:
        done = minres_rows.direction(
            *(flags_row, numbers_row, work, plane, slope, value, target, saved, save),
            *(size, last, tol, BLOCK),
        )
        tl.store(flags_row + sample.MODE, tl.where(done, sample.TRIAL, sample.DIRECTION))
        tl.store(flags_row + sample.WANTED, tl.where(done, sample.EXACT, sample.PRODUCT))
        return

    following = tl.full((), sample.DIRECTION, tl.int32)
    wanted = tl.full((), sample.PRODUCT, tl.int32)
    if heavy:
        if best_at == k % 2:
            minres_rows.keep(work, plane, slope, pre, size, BLOCK)
            tl.debug_barrier()
        tl.store(numbers_row + sample.NORM, norm)
        opens, wanted = momentum_step(
            *(flags_row, numbers_row, exact, norm, previous, relative, best, best_at),
            *(value, points, plane, change + row, save, size, k, max_iter, tol, RAMP, BLOCK),
        )
        if opens:
            minres_rows.iterate(work, plane, slope, 0, target, saved, save, size, BLOCK)
        following = tl.where(opens, sample.OPEN, sample.MOMENTUM)
    elif last:  # the plain step is all that is left
        for start in range(0, size, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            inside = entry < size
            plain = tl.load(value + entry, mask=inside, other=0.0)
            sample.replace(target, saved, entry, inside, save, plain)
        following = tl.full((), sample.TRIAL, tl.int32)
        wanted = tl.full((), sample.EXACT, tl.int32)
    else:
        scale = tl.where(anew, 1 / length, 1.0).to(tl.float32)
        made = tl.where(anew, 0, made)
        minres_rows.aim_along(work, plane, slope, made, scale, target, saved, save, size, BLOCK)
        tl.store(flags_row + sample.DIRECTIONS, made)
        # Where the estimate is sound, on towards a lower goal.
        lower = tol / relative
        aim *= tl.where(lower < 1, lower, 1.0) * _AIM
        tl.store(numbers_row + sample.AIM, tl.where(anew, _AIM, aim))
        if anew:
            tl.store(flags_row + sample.VAIN, vain)
            tl.store(flags_row + sample.EXHAUSTED, 0)
            tl.store(numbers_row + sample.RESTARTED_AT, tl.where(gains, norm, restarted_at))
            tl.store(numbers_row + sample.BETA, 0.0)
            tl.store(numbers_row + sample.SINE, 0.0)
            tl.store(numbers_row + sample.DIAGONAL, 0.0)
            tl.store(numbers_row + sample.CORNER, 0.0)
            tl.store(numbers_row + sample.COSINE, -1.0)
            tl.store(numbers_row + sample.PHI, length.to(tl.float32))
    tl.store(flags_row + sample.MODE, following)
    tl.store(flags_row + sample.WANTED, wanted)


def advance_minres(samples: Samples, value: Tensor, work: Tensor, k: int, limits: Limits) -> None:
    """After evaluation k; the next point goes to slot (k + 1) % 2 of ``samples.points``.

    ``value`` is (B, n), ``work`` (ROWS, B, n); ``samples.pre`` and ``samples.slope`` are needed. A
    solve begins at zero with MODE at OPEN, or MOMENTUM and RADIUS 0.5, and everything else as
    sample.py says.
    """
    assert samples.slope is not None
    _, batch, size = samples.points.shape
    block, warps = tile_of(size)
    with advance.on_device(value):
        advance_minres_kernel[(batch,)](
            samples.points,
            value,
            samples.pre,
            samples.slope,
            value if samples.change is None else samples.change,
            samples.sums,
            samples.numbers,
            samples.flags,
            samples.remaining,
            work,
            batch * size,
            size,
            samples.sums.shape[1],
            *(k, limits.max_iter, limits.patience, limits.tol),
            RAMP=samples.change is not None,
            BLOCK=block,
            num_warps=warps,
            maxnreg=MAX_REGISTERS,
        )


def tile_of(size: int) -> tuple[int, int]:
    """(BLOCK, number of warps) for rows of size n: 4 entries to a thread, as there are up to six
    sums in float64 and eight rows in registers."""
    block = max(32, min(1024, triton.next_power_of_2(size)))
    return block, max(1, block // 128)


class Minres:
    """MINRES as a method of solve_affine.py, whose option is momentum."""

    def __init__(self, problem: Any):
        self.samples, self.limits, *_ = problem
        _, batch, size = self.samples.points.shape
        self.values = problem.rows(batch, size)
        self.work = problem.rows(ROWS, batch, size)

    @staticmethod
    def begin(options: Sequence[float]) -> dict[str, Any]:
        """How its samples begin."""
        return {"mode": (sample.MOMENTUM if options[0] else sample.OPEN).value}

    def value(self, k: int) -> Tensor:
        return self.values

    def residual(self, k: int) -> Tensor | None:
        return None

    def advance(self, k: int) -> None:
        advance_minres(self.samples, self.values, self.work, k, self.limits)
