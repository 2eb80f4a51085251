"""Leading dimensions of an affine cell's input, as ``nn.Linear`` has them: each vector of
``(..., n)`` is a sample, and is solved as a row."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..cells import AffineCell
from ..samples import BatchDim
from ..solution import Solution
from .record import Record


class Leading:
    """The dimensions of x ``(..., n)`` in front of the last, and states of ``features`` with them.

    ``batch_dim`` is what counts samples in such a state: several dimensions, or None where there
    are none.
    """

    def __init__(self, x: Tensor, features: int):
        self._shape = x.shape[:-1]
        self._features = features
        count = len(self._shape)
        self.batch_dim: BatchDim = tuple(range(count)) if count else None

    def rows(self, t: Tensor) -> Tensor:
        """t ``(..., n)`` as ``(B, n)``."""
        return t.reshape(math.prod(self._shape), t.shape[-1])

    def start(self, z0: Any, what: str = "z0") -> Any:
        """A start, or ``what`` it is, as rows, or None.

        Raises:
            ValueError: z0 of another shape.
        """
        if z0 is None:
            return None
        shape = (*self._shape, self._features)
        if not isinstance(z0, Tensor) or z0.shape != shape:
            got = tuple(z0.shape) if isinstance(z0, Tensor) else type(z0).__name__
            raise ValueError(f"{what} is {got}; it must have shape {shape}.")
        return self.rows(z0)

    def state(self, rows: Tensor) -> Tensor:
        """Rows ``(B, features)`` as a state."""
        return rows.reshape(*self._shape, self._features)

    def solution(self, solution: Solution) -> Solution:
        """The solution with a state as its value; itself under a transform, whose samples are more
        than those of x."""
        if solution.value.shape[0] != math.prod(self._shape):
            return solution
        return replace(solution, value=self.state(solution.value), batch_dim=self.batch_dim)


def leading_of(cell: Any, x: Any) -> Leading | None:
    """The leading dimensions of x where they are not one, and the cell is an affine one that takes
    x as ``nn.Linear`` does; None elsewhere."""
    if not isinstance(cell, AffineCell) or not isinstance(x, Tensor) or x.dim() in (0, 2):
        return None
    if not cell.takes_vectors(x):
        return None
    return Leading(x, cell.features)


class LeadingRecord:
    """A layer's record that keeps solutions of rows as those of states; adjoints are rows, as
    those of any cell."""

    def __init__(self, record: Record, leading: Leading):
        self._record, self._leading = record, leading

    @property
    def forward(self) -> Any:
        return self._record.forward

    @forward.setter
    def forward(self, found: Any) -> None:
        if isinstance(found, Solution):
            found = self._leading.solution(found)
        elif found is not None:
            found = _Reshaped(found, self._leading)
        self._record.forward = found

    @property
    def adjoint(self) -> Any:
        return self._record.adjoint

    @adjoint.setter
    def adjoint(self, found: Any) -> None:
        self._record.adjoint = found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._record, name)


class _Reshaped:
    """The outputs of an operator on rows, of which a solution is made when it is asked for."""

    def __init__(self, found: Any, leading: Leading):
        self._found, self._leading = found, leading
        self.contraction = found.contraction
        self.unpack = found.unpack
        self.spec = self  # whoever makes the solution asks the spec for it

    def solution(self, outputs: Any, contraction: float | None) -> Solution:
        return self._leading.solution(self._found.spec.solution(outputs, contraction))
