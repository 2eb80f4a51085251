"""A map of rows, evaluated for the samples that are not finished where that is possible.

Whenever half of the samples that are evaluated have finished, or more, the rest goes on alone: its
points are gathered, and its values scattered among those of the others, which nobody reads. So no
solve makes more than twice the sample-evaluations that its samples need, beside those that are made
to compare. Counts decide, not clocks: the same input takes the same way each time.

Each time the rest is first evaluated at the last point again, and compared with its part of the
value that is known there. A difference means that the arguments were told apart wrongly, that
samples depend on each other, or that the map is random: no more is left out then. For this
the last point and its value are kept. What agrees at one point need not at another, so whoever
solves makes sure at the end, by a value for all samples (``general``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..solution import Solution

#: ``Solution.path`` where samples were left out, and where they could not be.
LEFT_OUT = "general, finished samples left out"
NOT_TOLD_APART = "general, samples not told apart"

Map = Callable[[Tensor], Tensor]
#: A map of rows that may return None for zeros.
Product = Callable[[Tensor], Tensor | None]


class Narrow(Protocol):
    """Makes the map of some samples ``(b,)`` int64 alone; None where there is none that agrees with
    the map before, whose ``value`` at ``rows``, both ``(b, n)``, is given if it is asked for."""

    def __call__(
        self, samples: Tensor, rows: Tensor | None, value: Tensor | None
    ) -> Product | None: ...


class Unfinished:
    """``whole``, a map of rows ``(B, n)``, and for some of the samples what ``narrow`` makes of it.

    ``asks_value`` says whether ``narrow`` needs rows and their value, which it evaluates again.
    """

    def __init__(self, whole: Product, narrow: Narrow, batch: int, *, asks_value: bool):
        self._whole, self._asks_value = whole, asks_value
        self._narrow: Narrow | None = narrow
        #: Whether each value is to be in memory of its own; else the next one overwrites it.
        self.own_memory = True
        self._samples: Tensor | None = None  # None: all
        self._last: tuple[Tensor, Tensor | None] | None = None  # rows of these, and their value
        self._part: Product | None = None
        self._value: Tensor | None = None
        self._count = batch  # samples in an evaluation
        self._left_out = 0  # of all samples' evaluations
        self._trials: list[int] = []  # samples in evaluations that were to be compared

    @property
    def left_out(self) -> bool:
        """Whether any sample was left out of an evaluation."""
        return self._left_out > 0

    def counted(self, solution: Solution) -> Solution:
        """The solution with the evaluations that were made, and its path."""
        assert solution.sample_evaluations is not None
        assert solution.evaluations is not None
        made = solution.sample_evaluations - self._left_out + sum(self._trials)
        evaluations = solution.evaluations + len(self._trials)
        path = LEFT_OUT if self.left_out else solution.path
        if self._narrow is None and not self.left_out:
            path = NOT_TOLD_APART
        return replace(solution, evaluations=evaluations, sample_evaluations=made, path=path)

    def first(self, map_of_rows: Product) -> Product:
        """``map_of_rows``, another way to the value of all samples."""

        def run(point: Tensor) -> Tensor | None:
            return self._seen(point, map_of_rows(point))

        return run

    def follow(self, left: int, running: Callable[[], Tensor]) -> None:
        """Hears after each evaluation that ``left`` samples go on at most, ``running()`` int64."""
        if self._narrow is None or left == 0 or 2 * left > self._count:
            return
        samples, rows, value = running(), None, None
        if len(samples) == 0:  # a count that came late
            return
        if self._asks_value:
            self._trials.append(len(samples))
            if self._last is not None and self._last[1] is not None:
                within = samples
                if self._samples is not None:  # these are among those, in order
                    within = torch.searchsorted(self._samples, samples)
                rows, value = (t.index_select(0, within) for t in self._last if t is not None)
        self._last = None
        part = self._narrow(samples, rows, value)
        if part is None:
            self._narrow = None
            return
        self._part, self._samples, self._count = part, samples, len(samples)

    def __call__(self, point: Tensor) -> Any:
        if self._samples is None:
            return self._seen(point, self._whole(point))
        assert self._part is not None
        self._left_out += len(point) - len(self._samples)
        rows = point.index_select(0, self._samples)
        found = self._seen(rows, self._part(rows))
        if self._value is None:
            self._value = torch.zeros_like(point)
        if found is None:
            found = self._value.new_zeros((1, 1))
        found = found.to(self._value.dtype).expand(len(rows), point.shape[1])
        if self.own_memory:
            self._value = self._value.index_copy(0, self._samples, found)
        else:
            self._value.index_copy_(0, self._samples, found)
        return self._value

    def _seen(self, rows: Tensor, value: Tensor | None) -> Tensor | None:
        if self._asks_value and self._narrow is not None:
            self._last = rows, value
        return value


def agree(
    value: Tensor, expected: Tensor, limit: float, parts: Sequence[int] | None = None
) -> bool:
    """Whether rows ``(b, n)`` are those ``expected`` to a relative ``limit``, in the 2-norm of each
    of the ``parts`` of a row."""
    if value.shape != expected.shape:
        return False
    sizes = [value.shape[1]] if parts is None else list(parts)
    # A value that is not finite shows nothing, and ends its sample.
    same = ~expected.isfinite().all(1)
    close = torch.ones_like(same)
    for one, other in zip(value.split(sizes, 1), expected.split(sizes, 1), strict=True):
        close &= torch.linalg.vector_norm(one - other, dim=1) <= limit * torch.linalg.vector_norm(
            other, dim=1
        )
    return bool((same | close).all())
