"""Whether residuals still fell at the end of a solve, from norms that the loop has computed anyway.

Kept by reference, a few of them, so that a solve computes nothing more and nothing waits.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from ..solvers import Solver, Step

_SPAN = 8  # iterates whose smallest residuals are compared: accelerated ones rise in between
_FALL = 0.7  # what is to be left, at most, in the second half of the iterations


class Trend:
    """Residual norms ``(B,)`` of iterates around the middle of a solve, and of its last ones."""

    def __init__(self, max_iter: int):
        self._middle_at = max_iter // 2
        self._steps = 0
        self._middle: tuple[Tensor, ...] = ()
        self._latest: deque[Tensor] = deque(maxlen=_SPAN)

    def add(self, norm: Tensor) -> None:
        self._latest.append(norm)
        if self._steps == self._middle_at:
            self._middle = tuple(self._latest)
        self._steps += 1

    def fell(self) -> Tensor:
        """``(B,)`` bool: for which samples it fell in the second half of all iterations."""
        end = torch.stack(tuple(self._latest)).amin(0)
        if not self._middle:
            return torch.zeros_like(end, dtype=torch.bool)
        return end <= _FALL * torch.stack(self._middle).amin(0)


class Traced:
    """A solver, with the trend of its residuals."""

    def __init__(self, solver: Solver, max_iter: int):
        self._solver = solver
        self.trend = Trend(max_iter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._solver, name)

    def step(self, state: Any, point: Tensor, value: Tensor, norm: Tensor, running: Tensor) -> Step:
        self.trend.add(norm)
        return self._solver.step(state, point, value, norm, running)
