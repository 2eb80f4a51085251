"""The scalars of one sample, and what every advance kernel does with them: csrc/cpu/worker.h.

Symbols: B samples of size n; k the number of the evaluation just made, 0 at the start. All running
samples are at the same k, so it is an argument and not stored.

One iteration is two launches: kernels/affine_step.py evaluates the rows that run, an advance kernel
(one program per sample) judges the evaluation and prepares the next. Between them a sample is

    flags (B, FLAGS) int32, numbers (B, NUMBERS) float32    the columns named below
    sums (B, T, 2)         |value - point|^2 and |value|^2 of each output tile
    points (P + 1, B, n)   P slots in turn: evaluation k is at points[k % P]. The last slot keeps a
                           best iterate whose own slot is written next; BEST_AT is where it is
    pre (B, n)             pre-activation of the evaluation, change (B, n) bfloat16: narrow products
    remaining (1,) int32   samples that run

and ``value``, which is no part of it. A stopped sample (WANTED = 0) is not touched again. Where
best iterates follow each other, as they do in a solve that goes well, none is ever copied.

Bytes per sample and launch: 2 lines of 128 bytes read and in part written, 8 T read.

In a kernel: every scalar is loaded once and stored once, with a barrier in between, as all threads
load it but one stores it; branches are on scalars, the same for all threads. The functions here
return values and store nothing, except ``stop`` and ``replace``.
kernels/load.py sets the columns at the start: numbers BEST to NORM_2, MARK, ANCHOR, GOAL,
TRUSTED_NORM and RESTARTED_AT are infinite, OMEGA, LED, ROW_NORM and LARGEST are 1, RADIUS is the
solver's; flags WANTED is EXACT, NARROWEST, MODE and PLAIN are as the solve begins; the rest is 0.
No GPU has run this yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

# Columns of flags; 22 to 31 are free.
FLAGS = tl.constexpr(32)
WANTED = tl.constexpr(0)  # the next evaluation: a kind below, 0 where the sample has stopped
MADE = tl.constexpr(1)  # the kind of the evaluation just made, written by the step kernel
HISTORY = tl.constexpr(2)  # 1: the next evaluation writes value - point to the history
STATUS = tl.constexpr(3)  # once stopped
ITERATIONS = tl.constexpr(4)  # once stopped
IDLE = tl.constexpr(5)  # verified iterates in a row without a new best residual
MODE = tl.constexpr(6)
SINCE = tl.constexpr(7)  # heavy ball: evaluations since MARK was set
BEST_AT = tl.constexpr(8)  # the slot of points
NARROWEST = tl.constexpr(9)  # the ramp: NARROW where narrow evaluations are allowed, else EXACT
SINCE_ANCHOR = tl.constexpr(10)  # the ramp: narrow evaluations since the last exact one
PLAIN = tl.constexpr(11)  # Anderson: no acceleration yet
ACCELERATED = tl.constexpr(12)  # Anderson: the point came from a mixing step
COUNT = tl.constexpr(13)  # Anderson: entries of the history before the newest
REJECTS = tl.constexpr(14)  # 3 counters, in the order of the solver's ``rejects``
DIRECTIONS = tl.constexpr(17)  # energy: directions made in this step
HALVINGS = tl.constexpr(18)  # energy
FLOOR = tl.constexpr(19)  # energy: the step began near the rounding floor
EXHAUSTED = tl.constexpr(20)  # MINRES: the Krylov space
VAIN = tl.constexpr(21)  # MINRES: restarts since the last one that brought a gain

# Columns of numbers; 12 and 22 to 29 are free.
NUMBERS = tl.constexpr(32)
BEST = tl.constexpr(0)  # best relative residual
NORM = tl.constexpr(1)  # residual norm of the last evaluation, of the one before, two before
NORM_1 = tl.constexpr(2)
NORM_2 = tl.constexpr(3)
MARK = tl.constexpr(4)  # heavy ball: residual norm to be halved
RADIUS = tl.constexpr(5)  # heavy ball: estimate
OMEGA = tl.constexpr(6)  # heavy ball: of the next step
LED = tl.constexpr(7)  # heavy ball: of the step that led to this point
ANCHOR = tl.constexpr(8)  # the ramp: relative residual at the last exact evaluation
GOAL = tl.constexpr(9)  # the ramp: relative residual at which the next one is due
TRUSTED_NORM = tl.constexpr(10)  # Anderson: residual norm of the last point not taken back
RESTARTED_AT = tl.constexpr(11)  # MINRES: best residual at the last restart with a gain
ENOUGH = tl.constexpr(13)  # energy: goal of |residual|^2 of conjugate gradients
LENGTH = tl.constexpr(14)  # energy: t
BETA = tl.constexpr(15)  # MINRES: as in csrc/cpu/line.h
COSINE = tl.constexpr(16)
SINE = tl.constexpr(17)
DIAGONAL = tl.constexpr(18)
CORNER = tl.constexpr(19)
PHI = tl.constexpr(20)
AIM = tl.constexpr(21)
ROW_NORM = tl.constexpr(30)  # adjoint: what the result is multiplied by, one after the other
LARGEST = tl.constexpr(31)

# Kinds of evaluation, in WANTED and MADE.
STOPPED = tl.constexpr(0)
EXACT = tl.constexpr(1)
NARROW = tl.constexpr(2)
PRODUCT = tl.constexpr(3)  # W point and nothing else: a direction

# MODE, as in csrc/cpu/line.h: what the point is.
STEPS = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
OPEN = tl.constexpr(2)
DIRECTION = tl.constexpr(3)
TRIAL = tl.constexpr(4)

# Status, as fastdeq.Status; RUNNING is no status of a result.
RUNNING = tl.constexpr(-1)
CONVERGED = tl.constexpr(0)
MAX_ITER = tl.constexpr(1)
STAGNATED = tl.constexpr(2)
NONFINITE = tl.constexpr(3)

RESIDUAL_EPS = tl.constexpr(1e-9)
_INFINITY = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
_TILES = tl.constexpr(64)  # sums read at a time

# The ramp, see csrc/cpu/ramp.h: largest drops of the residual between two exact evaluations, and
# the most evaluations of an accelerated sample between them.
_DROP = tl.constexpr(400.0)
_DROP_ACCELERATED = tl.constexpr(30.0)
_LONGEST_NARROW = tl.constexpr(25)
# Heavy ball, see fastdeq/solvers/heavy_ball.py.
_LARGEST_RADIUS = tl.constexpr(0.98)
_HALVE_WITHIN = tl.constexpr(6)


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
    """After an exact evaluation of an iterate: (improved, best, idle, status), the last RUNNING
    where the solve goes on."""
    improved = relative < best  # false for NaN
    best = tl.where(improved, relative, best)
    idle = tl.where(improved, 0, idle + 1)
    converged = best <= tol
    over = k >= max_iter if FIXED else converged | (k >= max_iter)
    status = tl.where(over, tl.where(converged, CONVERGED, MAX_ITER), RUNNING)
    return improved, best, idle, status


@triton.jit
def assess(numbers_row, flags_row, exact, relative, k, tol, max_iter, SLOTS: tl.constexpr, FIXED):
    """What ``judge`` finds where the evaluation was ``exact``, and else what was: (best, idle,
    BEST_AT, status)."""
    best = tl.load(numbers_row + BEST)
    idle = tl.load(flags_row + IDLE)
    best_at = tl.load(flags_row + BEST_AT)
    improved, lower, more, status = judge(relative, best, idle, k, tol, max_iter, FIXED)
    best_at = tl.where(exact & improved, k % SLOTS, best_at)
    status = tl.where(exact, status, RUNNING)
    return tl.where(exact, lower, best), tl.where(exact, more, idle), best_at, status


@triton.jit
def failure(best, tol):
    """The status of a sample that cannot go on: where there is no stop test it may have converged
    before."""
    return tl.where(best <= tol, CONVERGED, NONFINITE)


@triton.jit
def out_of_patience(idle, k, patience, FIXED: tl.constexpr):
    """Asked after a step that did not fail, of a sample just evaluated exactly."""
    idles = (k >= patience) & (idle >= patience)
    return idles & (k < 0) if FIXED else idles


@triton.jit
def stop(flags_row, remaining, status, k):
    tl.store(flags_row + WANTED, STOPPED)
    tl.store(flags_row + STATUS, status)
    tl.store(flags_row + ITERATIONS, k)
    tl.atomic_add(remaining, -1, sem="relaxed")


@triton.jit
def replace(target, saved, entry, inside, save, following):
    """Stores the next point; with ``save`` what lay there, the best iterate, is saved first. The
    same thread reads and writes an entry, so this needs no barrier."""
    kept = tl.load(target + entry, mask=only(inside, save), other=0.0)
    tl.store(saved + entry, kept, mask=only(inside, save))
    tl.store(target + entry, following, mask=inside)


@triton.jit
def anchor(relative, before, goal, since_anchor, narrowest, plain, tol):
    """The ramp, at an exact evaluation: (goal, narrowest). Equal drops on the way to the tolerance;
    the new ANCHOR is ``relative`` and SINCE_ANCHOR is 0. ``plain`` also for heavy-ball steps."""
    vain = (since_anchor > 0) & (goal < _INFINITY) & ((relative <= 0.5 * before) == 0)
    narrowest = tl.where(vain, EXACT, narrowest)
    largest = tl.where(plain != 0, _DROP, _DROP_ACCELERATED)
    target = 0.97 * tol
    ahead = (target > 0) & (relative > target)
    total = tl.log(tl.where(ahead, relative / tl.where(ahead, target, 1.0), 2.0))
    equal = tl.exp(total / tl.ceil(total / tl.log(largest)))
    return relative / tl.where(ahead, equal, largest), narrowest


@triton.jit
def next_kind(
    relative, norm, previous, plain, since_anchor, before, goal, narrowest, count, k, max_iter
):
    """The ramp: EXACT or NARROW for evaluation k + 1. ``before`` is the ANCHOR."""
    stepwise = tl.where(is_finite(previous), norm / previous, 0.9)
    some = tl.maximum(since_anchor, 1)
    mean = tl.exp2(tl.log2(relative / before) / some)
    rate = tl.where(plain != 0, stepwise, tl.where(since_anchor > 0, mean, 0.9))
    gets_on = tl.where(plain != 0, rate <= 0.98, rate < 1)  # false for NaN
    # A step taken back is a large change.
    accelerated_may = (since_anchor < _LONGEST_NARROW) & (count > 0)
    narrow = gets_on & (k + 1 < max_iter) & ((plain != 0) | accelerated_may)
    narrow = narrow & (relative * rate > goal) & (narrowest == NARROW)
    return tl.where(narrow, NARROW, EXACT)


@triton.jit
def learn(norm, previous, norm_1, norm_2, radius, led, omega, mark, since, k, trusted):
    """Heavy ball, after the step with ``omega``: takes in the residual norm of the evaluation just
    made, whose point ``led`` led to; ``previous``, ``norm_1``, ``norm_2`` are those of one, two and
    three evaluations before. Without ``trusted`` norms the estimate of the radius stays.

    Returns (radius, led, omega, mark, since, slow), the last true where the residual does not halve
    in time. The next NORM_1 is ``previous``, the next NORM_2 is ``norm_1``.
    """
    one = norm / previous
    three = tl.exp2(tl.log2(norm / norm_2) / 3)
    left = tl.where(one < three, one, three)
    gained = led - 1
    better = trusted & (k > 3) & (left > tl.sqrt_rn(gained))  # false for NaN
    seen = (left * left + gained) / (led * left)
    seen = tl.where(seen < _LARGEST_RADIUS, seen, _LARGEST_RADIUS)
    radius = tl.where(better & (seen > radius), seen, radius)
    halved = norm <= 0.5 * mark
    mark = tl.where(halved, norm, mark)
    since = tl.where(halved, 0, since + 1)
    following = 2 / (1 + tl.sqrt_rn(1 - radius * radius))
    return radius, omega, following, mark, since, since >= _HALVE_WITHIN


@dataclass(frozen=True)
class Limits:
    """When a solve ends; ``fixed``: after exactly ``max_iter`` updates."""

    tol: float
    max_iter: int
    patience: int
    fixed: bool = False


@dataclass(frozen=True)
class Samples:
    """The buffers above, and what a solve is given: ``offset`` is c, or g of an adjoint."""

    points: Tensor
    pre: Tensor | None  # where the slope at the result, the ramp or the method needs it
    sums: Tensor
    numbers: Tensor
    flags: Tensor
    remaining: Tensor
    offset: Tensor
    slope: Tensor | None = None  # (B, n) D of an adjoint
    change: Tensor | None = None  # where the ramp is on

    @property
    def slots(self) -> int:
        """P: the slots in turn."""
        return self.points.shape[0] - 1
