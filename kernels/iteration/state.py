"""The memory of an iteration of a general map: columns of scalars, chunks of rows, the history.

Symbols: B samples of size n in C chunks; k the number of an evaluation, the same for all samples
that run; W the most differences that Anderson acceleration uses, P the next power of two; T the
dtype of the state, float32 or float64.

    settings (SETTINGS,) float64      options of the solve
    flags (B, FLAGS) int32, numbers (B, NUMBERS) float64    columns of ../steps/sample.py and below
    running (2,) bool                 whether any sample runs after evaluation k, at k % 2
    spans (C, 2) int64                where each chunk begins and ends, in one part of the state, as
                                      multiples of ``unit``
    firsts (parts + 1,) int64         the first chunk of each part
    norms (B, C, 2) float64           |g|^2 and |f|^2 of each chunk, g = f - z
    products (B, C, P) float64        <g, g_i> of each chunk with the residuals in the history

and with a history, whose entries lie in slots that are taken from the memory when they are needed:

    addresses (W,) int64              of the slots: (2, B, n) of T, values f and residuals g
    places (B, P) int32               slots of a sample, newest evaluation first
    gram (B, W, W) float64            <g_i, g_j> by slot
    gamma (B, P) float64              weights of the step to take, by slot

A state of one part has no spans and firsts: chunk c begins at c times its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of flags, beside those of sample.py.
STEP = tl.constexpr(24)  # how the next point is found, below
IMPROVED = tl.constexpr(25)  # the last evaluation was of the best iterate so far
SLOT = tl.constexpr(26)  # of the history: where the evaluation goes, or is taken back to
HELD = tl.constexpr(27)  # slots in ``places``

# How the next point is found.
STILL = tl.constexpr(0)  # it stays: the sample has stopped
PLAIN_STEP = tl.constexpr(1)
MIX = tl.constexpr(2)  # with ``gamma``; the evaluation enters the history
TAKE_BACK = tl.constexpr(3)
MOMENTUM = tl.constexpr(4)

# Columns of numbers, beside those of sample.py; LATEST takes the place of energy's and MINRES's.
RATE = tl.constexpr(12)  # the last residual norm over the one before
LATEST = tl.constexpr(13)  # the last TREND_SPAN residual norms, in turn
MIDDLE = tl.constexpr(25)  # the least of those in the middle of all updates that are allowed
STEP_OMEGA = tl.constexpr(26)  # heavy ball: of the step to take
TREND_SPAN = tl.constexpr(8)

SETTINGS = tl.constexpr(16)
TOL = tl.constexpr(0)
ATOL = tl.constexpr(1)
MAX_ITER = tl.constexpr(2)
MOST_IDLE = tl.constexpr(3)  # the patience
FLOOR = tl.constexpr(4)  # relative residuals below it may be rounding
LARGEST = tl.constexpr(5)  # norms from there on count as diverged
DAMPING = tl.constexpr(6)
REGULARIZATION = tl.constexpr(7)
RANK_TOLERANCE = tl.constexpr(8)
MAX_WEIGHT = tl.constexpr(9)
SAFEGUARD = tl.constexpr(10)
ACCELERATE_ABOVE = tl.constexpr(11)

# Rows up to this length are walked by one program from the sums to the step, in one launch.
ONE_LAUNCH = 4096
LEAST_CHUNK = 2048
MOST_CHUNKS = 1024  # about: of a longer row the chunks are longer
# Up to so many numbers all slots of a history are taken at once.
SMALL_HISTORY = 65536


class Memory(NamedTuple):
    """In a kernel: the buffers above of one sample, and the settings."""

    settings: Any
    flags: Any
    numbers: Any
    firsts: Any
    norms: Any
    products: Any
    places: Any
    gram: Any
    gamma: Any


@dataclass(frozen=True)
class Chunks:
    """How rows of size n are divided; see above. ``unit`` is 16 where rows can be read and written
    in whole vectors, else 1."""

    length: int
    count: int
    parts: int
    unit: int
    spans: Tensor | None
    firsts: Tensor | None


def chunks_of(sizes: Sequence[int], device: torch.device) -> Chunks:
    """For a state of ``sizes``, those of its parts. Nothing is copied to the device, which a CUDA
    graph that is being recorded would not allow."""
    size = sum(sizes)
    length = max(LEAST_CHUNK, triton.next_power_of_2(triton.cdiv(size, MOST_CHUNKS)))
    if size <= ONE_LAUNCH:
        length = ONE_LAUNCH
    counts = [triton.cdiv(n, length) for n in sizes]
    if len(sizes) == 1:
        return Chunks(length, counts[0], 1, 1, None, None)
    unit = 1 if any(n % 16 for n in sizes) else 16
    spans = torch.empty(sum(counts), 2, dtype=torch.int64, device=device)
    firsts = torch.zeros(len(sizes) + 1, dtype=torch.int64, device=device)
    chunk = begin = 0
    for p, (n, count) in enumerate(zip(sizes, counts, strict=True)):
        rows = spans[chunk : chunk + count]
        first, step = begin // unit, length // unit
        torch.arange(first, first + count * step, step, out=rows[:, 0])
        torch.clamp(rows[:, 0] + step, max=(begin + n) // unit, out=rows[:, 1])
        chunk, begin = chunk + count, begin + n
        firsts[p + 1 :] += count
    return Chunks(length, sum(counts), len(sizes), unit, spans, firsts)


class History:
    """Slots for as many entries as there may be at an evaluation."""

    def __init__(self, like: Tensor, window: int):
        """For rows like ``like`` ``(B, n)``."""
        batch, size = like.shape
        columns = triton.next_power_of_2(window)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=like.device)

        self.window, self.columns = window, columns
        self.addresses = empty(window, dtype=torch.int64)
        self.places = empty(batch, columns, dtype=torch.int32)
        self.gram = empty(batch, window, window, dtype=torch.float64)
        self.gamma = torch.zeros(batch, columns, dtype=torch.float64, device=like.device)
        self._like = like.new_empty(0)
        self._shape = (batch, size)
        self._slots: list[Tensor] = []
        self._count = 0

    def reserve(self, needed: int) -> None:
        """Makes room for so many entries, at most ``window``."""
        batch, size = self._shape
        small = self.window * batch * size <= SMALL_HISTORY
        while self._count < needed:
            more = self.window - self._count if small else 1
            slots = self._like.new_empty(more, 2, batch, size)
            first, step = slots.data_ptr(), slots.stride(0) * slots.itemsize
            torch.arange(
                first,
                first + more * step,
                step,
                out=self.addresses[self._count : self._count + more],
            )
            self._slots.append(slots)
            self._count += more
