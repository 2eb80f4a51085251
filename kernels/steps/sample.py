"""The buffers of a solve: the columns of a sample's scalars, and the tensors that hold its rows.

Symbols: B samples of size n; k the number of the last evaluation, 0 at the start. All running
samples are at the same k, so it is an argument and not stored.

One iteration is two launches: affine_step.py evaluates the rows that run, a solver's kernel (one
program per sample) judges the evaluation and prepares the next. Between them a sample is

    flags (B, FLAGS) int32, numbers (B, NUMBERS) float32    the columns named below
    sums (B, T, 2)         |value - point| and |value| of each output tile
    points (P + 1, B, n)   P slots in turn: evaluation k is at points[k % P]. The last slot keeps a
                           best iterate whose own slot is written next; BEST_AT is where it is
    pre (B, n)             pre-activation of the evaluation
    change (B, n) bfloat16 input of low-precision products: this point less the one before
    remaining (1,) int32   samples that run

and the evaluation's value, which belongs to the solver. A stopped sample (REQUESTED = 0) is not
touched again. Where best iterates follow each other, as they do in a solve that goes well, none is
ever copied.

Bytes per sample and launch: 256 of scalars read and in part written, 8 T read.

In a kernel: every scalar is loaded once and stored once, with a barrier in between, as all threads
load it but one stores it; branches are on scalars, the same for all threads. begin_end.py sets the
columns at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...solvers.solve_options import SolveOptions

# Columns of flags; 24 to 31 are free.
FLAGS = tl.constexpr(32)
REQUESTED = tl.constexpr(0)  # kind of the next evaluation, 0 where the sample has stopped
EVALUATED = tl.constexpr(1)  # kind of the last evaluation, written by the step kernel
HISTORY = tl.constexpr(2)  # 1: the next evaluation writes value - point to the history
STATUS = tl.constexpr(3)  # once stopped
ITERATIONS = tl.constexpr(4)  # once stopped
IDLE = tl.constexpr(5)  # verified iterates in a row that were not the best so far
MODE = tl.constexpr(6)
STEPS_SINCE_HALVED = tl.constexpr(7)  # heavy ball: evaluations since NORM_TO_HALVE was set
BEST_AT = tl.constexpr(8)  # the slot of points
LOWEST = tl.constexpr(9)  # schedule: LOW where low-precision evaluations are allowed, else FULL
SINCE_FULL = tl.constexpr(10)  # schedule: low-precision evaluations since the last full one
PLAIN = tl.constexpr(11)  # Anderson: no acceleration yet
ACCELERATED = tl.constexpr(12)  # Anderson: the point came from a mixing step
COUNT = tl.constexpr(13)  # Anderson: entries of the history before the newest
REJECTS = tl.constexpr(14)  # 3 counters, in the order of the solver's ``rejects``
DIRECTIONS = tl.constexpr(17)  # energy, MINRES: directions evaluated in this step
HALVINGS = tl.constexpr(18)  # energy
FLOOR = tl.constexpr(19)  # energy: the step began near the rounding floor
EXHAUSTED = tl.constexpr(20)  # MINRES: the Krylov space
VAIN_RESTARTS = tl.constexpr(21)  # MINRES: since the last one that brought a gain
MEETS = tl.constexpr(22)  # the best iterate meets the tolerance
REFILLS = tl.constexpr(23)  # Anderson: plain steps until the history is full again

# Columns of numbers; 12 and 25 to 29 are free.
NUMBERS = tl.constexpr(32)
BEST = tl.constexpr(0)  # best relative residual
NORM = tl.constexpr(1)  # residual norm of the last evaluation, of the one before, two before
NORM_1 = tl.constexpr(2)
NORM_2 = tl.constexpr(3)
NORM_TO_HALVE = tl.constexpr(4)  # heavy ball: residual norm to be halved
RADIUS = tl.constexpr(5)  # heavy ball: estimate
OMEGA = tl.constexpr(6)  # heavy ball: of the next step
PREVIOUS_OMEGA = tl.constexpr(7)  # heavy ball: of the step to this point
LAST_FULL = tl.constexpr(8)  # schedule: relative residual at the last full-precision evaluation
GOAL = tl.constexpr(9)  # schedule: relative residual at which the next one is due
TRUSTED_NORM = tl.constexpr(10)  # Anderson: residual norm of the last point not taken back
RESTARTED_AT = tl.constexpr(11)  # MINRES: best residual at the last restart with a gain
ENOUGH = tl.constexpr(13)  # energy: |residual|^2 of conjugate gradients that ends them
LENGTH = tl.constexpr(14)  # energy: t
BETA = tl.constexpr(15)  # MINRES: symbols as in fastdeq/solvers/minres.py
COSINE = tl.constexpr(16)
SINE = tl.constexpr(17)
DIAGONAL = tl.constexpr(18)
CORNER = tl.constexpr(19)
PHI = tl.constexpr(20)
AIM = tl.constexpr(21)
LEAST_NORM = tl.constexpr(22)  # least residual norm of a best iterate
HALF_NOW = tl.constexpr(23)  # least residual norm in this half of the patience, and in the last
HALF_BEFORE = tl.constexpr(24)
ROW_NORM = tl.constexpr(30)  # adjoint: what the result is multiplied by, one after the other
LARGEST = tl.constexpr(31)

# Kinds of evaluation, in REQUESTED and EVALUATED.
STOPPED = tl.constexpr(0)
FULL = tl.constexpr(1)  # in full precision, float32
LOW = tl.constexpr(2)  # in low precision: a bfloat16 product of the change
PRODUCT = tl.constexpr(3)  # W point and nothing else: a direction

# MODE: what the point is.
STEPS = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
OPEN = tl.constexpr(2)
DIRECTION = tl.constexpr(3)
TRIAL = tl.constexpr(4)


class Work(NamedTuple):
    """The rows of the work buffer that belong to one sample: the first, from one to the next."""

    rows: Any
    stride: Any
    size: Any


@triton.jit
def row_at(work, index):
    return work.rows + index * work.stride


class Row(NamedTuple):
    """In a kernel: pointers to the scalars of its sample, and to the number of running samples."""

    flags: Any
    numbers: Any
    remaining: Any


@triton.jit
def row_of(i, flags, numbers, remaining):
    return Row(flags + i * FLAGS, numbers + i * NUMBERS, remaining)


@dataclass(frozen=True)
class Samples:
    """The buffers above, and what a solve is given: ``offset`` is c, or g of an adjoint."""

    points: Tensor
    pre: Tensor | None  # where the slope at the result, the schedule or the solver needs it
    sums: Tensor
    numbers: Tensor
    flags: Tensor
    remaining: Tensor
    offset: Tensor
    slope: Tensor | None = None  # (B, n) D of an adjoint
    change: Tensor | None = None  # with the precision schedule

    @property
    def slots(self) -> int:
        """P: the slots in turn."""
        return self.points.shape[0] - 1

    def arguments(self) -> dict[str, Any]:
        """What every solver's kernel is launched with."""
        _, batch, size = self.points.shape
        return {
            "points": self.points,
            "change": self.points if self.change is None else self.change,
            "sums": self.sums,
            "numbers": self.numbers,
            "flags": self.flags,
            "remaining": self.remaining,
            "slot_stride": batch * size,
            "size": size,
            "tiles": self.sums.shape[1],
            "SCHEDULE": self.change is not None,
        }


def rows_tile(size: int, entries: int = 8) -> dict[str, int]:
    """BLOCK and warps for a program that walks rows of size n, so many entries to a thread."""
    block = max(32, min(1024, triton.next_power_of_2(size)))
    return {"BLOCK": block, "num_warps": max(1, block // (32 * entries))}


class Steps:
    """A solver in this engine: it has the value of evaluation k put to ``value(k)`` ``(B, n)`` and,
    for a sample with HISTORY, the residual to ``residual(k)``; ``advance(k)`` judges the evaluation
    and writes the next point."""

    slots: ClassVar[int] = 2  # of points
    needs_pre: ClassVar[bool] = False

    def __init__(self, samples: Samples, options: SolveOptions, activation: int | None):
        """``activation`` is None in an adjoint."""
        self.samples, self.options, self.activation = samples, options, activation

    @staticmethod
    def why_not(options: SolveOptions) -> str:
        """Which option is not supported; empty where all are."""
        return ""

    @staticmethod
    def begins(options: SolveOptions) -> dict[str, Any]:
        """How its samples begin, as arguments of ``begin_end.begin``."""
        return {}

    @staticmethod
    def has_low_precision(options: SolveOptions) -> bool:
        """Whether it ever requests a low-precision evaluation."""
        return True

    def empty_rows(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.samples.points.device)

    def value(self, k: int) -> Tensor:
        raise NotImplementedError

    def residual(self, k: int) -> Tensor | None:
        return None

    def advance(self, k: int) -> None:
        raise NotImplementedError
