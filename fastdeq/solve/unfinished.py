"""A map of rows, evaluated for the samples that are not finished where that is possible.

Whenever half of the samples that are evaluated have finished, or more, the rest goes on alone: its
points are gathered, and its values scattered among those of the others, which nobody reads. So no
solve makes more than twice the sample-evaluations that its samples need. Counts decide, not clocks:
the same input takes the same way each time.

Before that, once in each solve, the rest is evaluated at the last point again, and compared with
its part of the value for the whole batch there. A difference means that the arguments were told
apart wrongly, that samples depend on each other, or that the map is random: nothing is left out
then. For this the last point and its value are kept until the first samples are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..solution import Solution

Map = Callable[[Tensor], Tensor]
#: A map of rows that may return None for zeros.
Product = Callable[[Tensor], Tensor | None]


class Narrow(Protocol):
    """Makes the map of some samples ``(b,)`` int64 alone; None where there is none that agrees with
    the map of all, whose ``value`` at ``point``, both ``(B, n)``, is given if it is at hand."""

    def __call__(
        self, samples: Tensor, point: Tensor | None, value: Tensor | None
    ) -> Product | None: ...


class Unfinished:
    """``whole``, a map of rows ``(B, n)``, and for some of the samples what ``narrow`` makes of it.

    ``asks_value`` says whether ``narrow`` needs a point and the value of all samples there.
    """

    def __init__(self, whole: Product, narrow: Narrow, batch: int, *, asks_value: bool):
        self._whole, self._asks_value = whole, asks_value
        self._narrow: Narrow | None = narrow
        #: Whether each value is to be in memory of its own; else the next one overwrites it.
        self.own_memory = True
        self._samples: Tensor | None = None  # None: all
        self._last: tuple[Tensor, Tensor | None] | None = None  # a point and its value
        self._part: Product | None = None
        self._value: Tensor | None = None
        self._count = batch  # samples in an evaluation
        self._left_out = 0  # of all samples' evaluations

    def counted(self, solution: Solution) -> Solution:
        """The solution with the sample-evaluations that were made."""
        assert solution.sample_evaluations is not None
        made = solution.sample_evaluations - self._left_out
        return replace(solution, sample_evaluations=made)

    def first(self, map_of_rows: Product) -> Product:
        """``map_of_rows``, another way to the value of all samples."""

        def run(point: Tensor) -> Tensor | None:
            return self._seen(point, map_of_rows(point))

        return run

    def follow(self, left: int, running: Callable[[], Tensor]) -> None:
        """Hears after each evaluation that ``left`` samples go on at most, ``running()`` int64."""
        if self._narrow is None or left == 0 or 2 * left > self._count:
            return
        samples, last = running(), self._last
        self._last = None
        part = self._narrow(samples, *(last or (None, None)))
        if part is None:
            self._narrow = None
            return
        self._part, self._samples, self._count = part, samples, len(samples)

    def __call__(self, point: Tensor) -> Any:
        if self._samples is None:
            return self._seen(point, self._whole(point))
        assert self._part is not None
        self._left_out += len(point) - len(self._samples)
        found = self._part(point.index_select(0, self._samples))
        if self._value is None:
            self._value = torch.zeros_like(point)
        if found is None:
            found = self._value.new_zeros(())
        rows = found.to(self._value.dtype).expand(len(self._samples), -1)
        if self.own_memory:
            self._value = self._value.index_copy(0, self._samples, rows)
        else:
            self._value.index_copy_(0, self._samples, rows)
        return self._value

    def _seen(self, point: Tensor, value: Tensor | None) -> Tensor | None:
        if self._asks_value and self._narrow is not None:
            self._last = point, value
        return value


def agree(part: Tensor, whole: Tensor, tol: float, eps: float) -> bool:
    """Whether rows ``part`` ``(b, n)`` are those of a ``whole`` evaluation, up to rounding with the
    machine epsilon ``eps`` or a tenth of the tolerance: a residual that is judged with either is
    then the same to a tenth of what decides."""
    if part.shape != whole.shape:
        return False
    difference = torch.linalg.vector_norm(part - whole, dim=1)
    limit = max(tol / 10, 16 * eps) * torch.linalg.vector_norm(whole, dim=1)
    # A value that is not finite shows nothing, and ends its sample.
    same = (difference <= limit) | ~whole.isfinite().all(1)
    return bool(same.all())
