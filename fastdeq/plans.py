"""How a solve and its adjoint run: what the forward pass decides, and the backward pass keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import affine, engines
from .solution import Solution
from .solvers import Solver


def _ignore(solution: Solution) -> None:
    return None


@dataclass(frozen=True)
class AdjointPlan:
    """How a gradient's linear solve runs, and who is told of its solution."""

    solver: Solver
    tol: float
    max_iter: int
    precision: str
    backend: str
    anderson_mix: Callable[..., Any]
    symmetric: bool = False
    report: Callable[[Solution], None] = field(default=_ignore)

    def solve_affine(
        self, weight: Tensor, slope: Tensor, grad: Tensor, packed: Tensor | None = None
    ) -> Tensor:
        """``q = D (g + q W)``, reported; ``packed`` is what the forward solve left for it."""
        solve = engines.chosen("solve_affine_adjoint", self.backend, grad.device, self.solver)
        q, status, iterations, residual, rejects = solve(
            weight,
            slope,
            grad,
            *affine.encode(self.solver),
            self.tol,
            self.max_iter,
            self.precision,
            self.symmetric,
            packed,
        )
        if not torch.compiler.is_compiling():  # a traced backward pass may not touch the layer
            counters = dict(zip(self.solver.rejects, rejects.unbind(1), strict=True))
            self.report(Solution(q, status, iterations, residual, counters))
        return q

    def silent(self) -> AdjointPlan:
        """The same plan for a derivative of the gradient, which nobody follows."""
        return replace(self, report=_ignore)


@dataclass(frozen=True)
class AffinePlan:
    """How the forward solve of an affine cell runs."""

    activation: str
    solver: Solver
    tol: float
    max_iter: int
    precision: str
    backend: str
    symmetric: bool

    def solve(self, weight: Tensor, c: Tensor, start: Tensor | None, slope: bool) -> affine.Outputs:
        solve = engines.chosen("solve_affine", self.backend, c.device, self.solver)
        return solve(
            weight,
            c,
            start,
            self.activation,
            *affine.encode(self.solver),
            self.tol,
            self.max_iter,
            self.precision,
            slope,
            self.symmetric,
        )
