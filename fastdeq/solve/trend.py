"""Whether residuals still fell at the end of a solve, from norms that the iteration has computed
anyway: nothing more is computed before somebody asks, and nothing waits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..solvers import Solver, Step

_SPAN = 8  # iterates whose smallest residuals are compared: accelerated ones rise in between
_FALL = 0.7  # what is to be left, at most, in the second half of the iterations


@dataclass(frozen=True)
class Trend:
    """The least residual norms ``(B,)`` of some iterates around the middle of a solve, infinite
    where there were none, and of its last ones."""

    middle: Tensor
    end: Tensor

    def fell(self) -> Tensor:
        """``(B,)`` bool: for which samples it fell in the second half of all iterations."""
        return self.middle.isfinite() & (self.end <= _FALL * self.middle)


class Traced:
    """A solver, with the trend of its residuals."""

    def __init__(self, solver: Solver, max_iter: int):
        self._solver = solver
        self._middle_at = max_iter // 2
        self._steps = 0
        self._middle: tuple[Tensor, ...] = ()
        self._latest: deque[Tensor] = deque(maxlen=_SPAN)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._solver, name)

    def step(self, state: Any, point: Tensor, value: Tensor, norm: Tensor, running: Tensor) -> Step:
        self._latest.append(norm)
        if self._steps == self._middle_at:
            self._middle = tuple(self._latest)
        self._steps += 1
        return self._solver.step(state, point, value, norm, running)

    def fell(self) -> Tensor:
        """As :meth:`Trend.fell`, after one step at least."""
        end = torch.stack(tuple(self._latest)).amin(0)
        middle = torch.stack(self._middle).amin(0) if self._middle else end.new_full((), torch.inf)
        return Trend(middle, end).fell()
