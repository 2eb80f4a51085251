"""The latest solves of a layer, and what happens when part of one failed."""

from __future__ import annotations

from typing import Any

import torch

from ..solution import Solution, handle_failure, may_look


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
