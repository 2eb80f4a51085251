"""States along a solve: the iterates of a general map after given numbers of updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..solution import Solution
from .spec import Map


class Along:
    """Copies of the points that a solve comes through after ``counts`` updates, in ascending order.

    Evaluation k, from 0, is at the point after k updates of every sample that goes on; the others
    are frozen where they stopped. ``states`` are in the end what is returned for these points.
    """

    def __init__(self, counts: Sequence[int]):
        self.counts = tuple(counts)
        self.states: list[Any] = []
        self._points: dict[int, Tensor] = {}
        self._evaluations = 0

    def watching(self, f: Map) -> Map:
        """f, from its second evaluation on: the first one is made otherwise."""
        self._points, self._evaluations = {}, 0

        def run(point: Tensor) -> Tensor:
            self._evaluations += 1
            if self._evaluations in self.counts:
                # An iteration leaves a point alone that somebody holds.
                self._points[self._evaluations] = point.detach()
            return f(point)

        return run

    def finish(
        self,
        solution: Solution,
        attach: Callable[[Solution], Tensor],
        unpack: Callable[[Tensor], Any],
    ) -> None:
        """Makes the states, by ``attach`` from solutions that ended at these points."""
        stopped = solution.nonfinite.unsqueeze(1)
        self.states = []
        for count in self.counts:
            point = self._points.pop(count, solution.value)
            so_far = replace(
                solution,
                value=torch.where(stopped, solution.value, point),
                iterations=solution.iterations.clamp(max=count),
            )
            self.states.append(unpack(attach(so_far)))
