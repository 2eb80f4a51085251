"""The latest solves of a layer, and what happens when part of one failed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch

from ..failure import handle_failure
from ..solution import Solution, may_look

#: Hears "forward" or "adjoint", and the solution of such a solve.
OnSolution = Callable[[str, Solution], None]
_DIRECTIONS = ("forward", "adjoint")


class Record:
    """The latest forward and adjoint solve of a layer, and whether it has warned.

    ``forward`` and ``adjoint`` are None, a :class:`Solution`, or the outputs of an operator, of
    which ``solution`` makes one when it is asked for: a small solve takes no longer than that.
    A graph may hold a record, and a record never holds a graph or a layer, so neither keeps the
    other alive.
    """

    def __init__(self, warned: set[str] | None = None) -> None:
        self.forward: Any = None
        self.adjoint: Any = None
        self.on_failure = "warn"
        self.warned: set[str] = set() if warned is None else warned

    def solution(self, direction: str) -> Solution | None:
        """The latest solution in ``direction``, "forward" or "adjoint"."""
        found = getattr(self, direction)
        if found is not None and not isinstance(found, Solution):
            found = found.spec.solution(found.unpack(), found.contraction)
            setattr(self, direction, found)
        solution: Solution | None = found
        return solution

    def put(self, direction: str, solution: Solution | None) -> None:
        """Sets the latest solution of a direction, which is no solve of the layer's."""
        object.__setattr__(self, direction, solution)

    def kept(self) -> dict[str, list[Solution]]:
        """The latest solutions of each direction, as far as they are kept."""
        return {direction: [] for direction in _DIRECTIONS}

    def receive_adjoint(self, solution: Solution | None) -> None:
        """Keeps the solution of an adjoint solve and applies the policy to it; None when the solve
        begins: the one before need not take memory meanwhile."""
        self.adjoint = solution
        if solution is not None and may_look(solution.status):
            self.judge_adjoint()

    def judge_forward(self) -> None:
        """Applies the policy to the latest forward solve."""
        self.judge("forward", "DEQLayer, forward solve")

    def judge_adjoint(self) -> None:
        """Applies the policy to the latest adjoint solve."""
        self.judge("adjoint", "DEQLayer, adjoint solve")

    def judge(self, direction: str, what: str) -> None:
        """Applies the policy to a solution; warns once for each direction."""
        if self.on_failure == "ignore" or what in self.warned or torch.compiler.is_compiling():
            return
        solution = self.solution(direction)
        if solution is not None and handle_failure(solution, self.on_failure, what):
            self.warned.add(what)


class WatchedRecord(Record):
    """A record that keeps the latest solutions of each direction, without their values, and passes
    each solution on before the policy for failures is applied to it."""

    def __init__(
        self, keep: int, on_solution: OnSolution | None, warned: set[str] | None = None
    ) -> None:
        self._on_solution = on_solution
        self._kept = {direction: deque[Solution](maxlen=keep) for direction in _DIRECTIONS}
        super().__init__(warned)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        # Nothing has numbers while a graph is traced.
        if name not in _DIRECTIONS or value is None or torch.compiler.is_compiling():
            return
        if not isinstance(value, Solution):
            value = value.spec.solution(value.unpack(), value.contraction)
            object.__setattr__(self, name, value)
        self._kept[name].append(value.with_value(None))
        if self._on_solution is not None:
            self._on_solution(name, value)

    def kept(self) -> dict[str, list[Solution]]:
        return {direction: list(kept) for direction, kept in self._kept.items()}


def new_record(keep: int, on_solution: OnSolution | None, warned: set[str] | None = None) -> Record:
    """A record that is watched where that is asked for."""
    if keep or on_solution is not None:
        return WatchedRecord(keep, on_solution, warned)
    return Record(warned)


def check_watching(keep: object, on_solution: Any) -> tuple[int, OnSolution | None]:
    """Both as they are; raises ValueError or TypeError for others than a count and a function."""
    if not isinstance(keep, Integral) or isinstance(keep, bool) or keep < 0:
        raise ValueError(
            f"keep_solutions must be how many solutions of each direction to keep, an integer >= 0 "
            f"such as 100, got {keep!r}."
        )
    if on_solution is not None and not callable(on_solution):
        raise TypeError(
            "on_solution must be a function of a direction, 'forward' or 'adjoint', and a "
            f"Solution, got {on_solution!r}."
        )
    return int(keep), on_solution
