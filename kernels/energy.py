"""The advance kernel of the energy solver: conjugate gradients, line search on E, verification.
Algorithm, symbols and sources: fastdeq/solvers/energy.py; the scalars of a sample and its buffers:
sample.py; passes over the rows: energy_rows.py; heavy-ball steps at the beginning: advance.py.

Symbols: B samples of size n, z = phi(a), s = (W z + c) - a, D = phi'(a), h = D^1/2; d a direction
of conjugate gradients, r their residual, p = W h d, alpha and beta their numbers.

    direction   da += alpha p,  r -= alpha (d - h p),  d = r + beta d;  next point h d
    trial       next point phi(a + t da)
    accepted    a += t da, new s, h, r = d = h s, da = s;               next point h d

Tile layout: one program per sample, which walks its rows in pieces of BLOCK.

Bytes per sample beside sample.py's, in rows of 4 n bytes:
    direction   9 read and 4 written; the last of a step, which need not keep d and r, 7 and 2
    trial       6 read to judge it; if accepted 4 read and 6 written, else 2 and 1
    heavy ball  as in advance.py, and 1 read and written for a of the best iterate
    and 1 read and written where a best iterate was not followed by a better one, as by directions
The first direction of a step finds d where r is and da where s is. A second pass over a row finds
it in a cache. Operations per entry: 10 in float32 and 10 in float64 for a direction, about 200 in
float32 for a trial, most of them for slope and primitive of phi, twice each.

Compared with fastdeq/solvers/energy.py by Triton's interpreter on a CPU; compiled for sm_80 and
sm_90. No GPU has run it: block sizes and warp counts are choices, not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import advance, energy_rows, sample
from .hand_over import momentum_step
from .sample import Limits, Samples

SLOTS = 2  # of points
ROWS = energy_rows.ROWS
MAX_REGISTERS = 128  # of a thread; left to itself, ptxas may take 80 and spill

# As in fastdeq/solvers/energy.py.
_MOST_FORCING = tl.constexpr(0.7)
_FORCING_POWER = tl.constexpr(0.2)
_NEWTON_HALVINGS = tl.constexpr(8)
_MOST_HALVINGS = tl.constexpr(30)
_FLOOR = tl.constexpr(16 * 2.0**-23)
_FLOOR_HALVINGS = tl.constexpr(3)
_SLOTS = tl.constexpr(SLOTS)


# k changes from call to call, and the limits from solve to solve: specialising on their values
# would compile anew.
@triton.jit(do_not_specialize=["k", "max_iter", "patience", "most"])
def advance_energy_kernel(
    points,
    value,  # (B, n)
    pre,
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
    most,  # directions of a step
    tol: tl.float32,
    ACTIVATION: tl.constexpr,
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
    halvings = tl.load(flags_row + sample.HALVINGS)
    at_floor = tl.load(flags_row + sample.FLOOR) != 0
    rejects = tl.load(flags_row + sample.REJECTS)
    t = tl.load(numbers_row + sample.LENGTH)
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
    point = points + (k % 2) * plane
    target = points + ((k + 1) % 2) * plane
    saved = points + 2 * plane
    work += row
    value += row
    pre += row
    heavy = mode == sample.MOMENTUM
    tries = (mode == sample.TRIAL) & (status == sample.RUNNING)
    fell = tries & (k < 0)
    if tries:
        fell = energy_rows.falls(work, plane, t, point, pre, size, ACTIVATION, BLOCK)
    rejected = tries & (fell == 0)
    halvings = tl.where(rejected, halvings + 1, 0)
    stalls = halvings > tl.where(at_floor, _FLOOR_HALVINGS, _MOST_HALVINGS)
    stalls = stalls | (exact & sample.out_of_patience(idle, k, patience, False))
    handed = heavy & sample.is_finite(best)
    fails = exact & (sample.is_finite(norm) == 0) & (tries == 0) & (handed == 0)
    ends = tl.where(fails, sample.failure(best, tol), sample.STAGNATED)
    status = tl.where((status == sample.RUNNING) & (fails | stalls), ends, status)

    # All threads have loaded what one of them stores from here on.
    tl.debug_barrier()
    tl.store(numbers_row + sample.BEST, best)
    tl.store(flags_row + sample.IDLE, idle)
    tl.store(flags_row + sample.REJECTS, rejects + rejected.to(tl.int32))
    if status != sample.RUNNING:
        tl.store(flags_row + sample.BEST_AT, best_at)
        sample.stop(flags_row, remaining, status, k)
        return
    save = best_at == (k + 1) % 2
    tl.store(flags_row + sample.BEST_AT, tl.where(save, _SLOTS, best_at))

    if mode == sample.DIRECTION:
        done = energy_rows.direction(
            *(flags_row, numbers_row, work, plane, value, target, saved, save),
            *(size, most, ACTIVATION, BLOCK),
        )
        tl.store(flags_row + sample.MODE, tl.where(done, sample.TRIAL, sample.DIRECTION))
        tl.store(flags_row + sample.WANTED, tl.where(done, sample.EXACT, sample.PRODUCT))
        return

    opens = (mode == sample.OPEN) & (k == 0)
    wanted = tl.full((), sample.EXACT, tl.int32)
    if opens | (heavy & (best_at == k % 2)):
        energy_rows.keep(work, plane, pre, size, BLOCK)
        tl.debug_barrier()
    if heavy:
        tl.store(numbers_row + sample.NORM, norm)
        opens, wanted = momentum_step(
            *(flags_row, numbers_row, exact, norm, previous, relative, best, best_at),
            *(value, points, plane, change + row, save, size, k, max_iter, tol, RAMP, BLOCK),
        )
    begins = fell | ((mode == sample.OPEN) & (opens == 0))
    left = tl.full((), 0.0, tl.float64)
    if begins:
        left = energy_rows.begin(
            *(work, plane, t, fell, point, pre, target, saved, save, size, ACTIVATION, BLOCK)
        )
        power = tl.exp2(tl.log2(relative) * _FORCING_POWER)
        forcing = tl.where(power < _MOST_FORCING, power, _MOST_FORCING)  # false for NaN
        tl.store(numbers_row + sample.ENOUGH, (forcing * forcing * left).to(tl.float32))
        tl.store(flags_row + sample.FLOOR, (relative < _FLOOR).to(tl.int32))
        tl.store(flags_row + sample.DIRECTIONS, 0)
        tl.debug_barrier()
    # Where there is nothing to solve for (D = 0 everywhere), the plain step.
    directs = begins & (left > 0)
    plain = begins | (rejected & (halvings == _NEWTON_HALVINGS))
    t = tl.where(rejected & (plain == 0), 0.5 * t, 1.0)
    if opens | rejected | (begins & (directs == 0)):
        save = save & (begins == 0)
        energy_rows.attempt(
            *(work, plane, t, plain, opens, target, saved, save, size, ACTIVATION, BLOCK)
        )
    following = tl.where(directs, sample.DIRECTION, tl.where(opens, sample.OPEN, sample.TRIAL))
    following = tl.where(heavy & (opens == 0), sample.MOMENTUM, following)
    tl.store(flags_row + sample.MODE, following)
    tl.store(flags_row + sample.WANTED, tl.where(directs, sample.PRODUCT, wanted))
    tl.store(flags_row + sample.HALVINGS, halvings)
    tl.store(numbers_row + sample.LENGTH, t)


def advance_energy(
    samples: Samples,
    value: Tensor,
    work: Tensor,
    k: int,
    limits: Limits,
    activation: int,
    most_directions: int,
) -> None:
    """After evaluation k; the next point goes to slot (k + 1) % 2 of ``samples.points``.

    ``value`` is (B, n), ``work`` (ROWS, B, n), and ``samples.pre`` is needed. A solve begins with
    MODE at OPEN, or MOMENTUM and RADIUS 0.5, and everything else as sample.py says.
    """
    _, batch, size = samples.points.shape
    block, warps = tile_of(size)
    with advance.on_device(value):
        advance_energy_kernel[(batch,)](
            samples.points,
            value,
            samples.pre,
            value if samples.change is None else samples.change,
            samples.sums,
            samples.numbers,
            samples.flags,
            samples.remaining,
            work,
            batch * size,
            size,
            samples.sums.shape[1],
            *(k, limits.max_iter, limits.patience, most_directions, limits.tol),
            ACTIVATION=activation,
            RAMP=samples.change is not None,
            BLOCK=block,
            num_warps=warps,
            maxnreg=MAX_REGISTERS,
        )


def tile_of(size: int) -> tuple[int, int]:
    """(BLOCK, number of warps) for rows of size n: 4 entries to a thread, as there are up to five
    sums in float64 and as many rows in registers."""
    block = max(32, min(1024, triton.next_power_of_2(size)))
    return block, max(1, block // 128)


class Descent:
    """The energy solver as a method of solve_affine.py; its options: momentum, directions."""

    def __init__(self, problem: Any):
        self.samples, self.limits, self.options, self.activation = problem
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
        directions = int(self.options[1])
        advance_energy(
            self.samples, self.values, self.work, k, self.limits, self.activation, directions
        )
