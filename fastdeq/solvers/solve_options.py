"""How a solve of an affine cell runs, as flat named fields: what operators, C++ and Triton are told.

An operator's schema has one argument for each field, of the same name and type; C++ reads them by
name into a struct of the same fields (csrc/common/solve_options.h).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Solver


@dataclass(frozen=True)
class SolveOptions:
    """A solver with its options, tolerance and limits. An option that the solver does not have
    keeps its default and means nothing."""

    solver: str
    tol: float
    max_iter: int
    patience: int
    precision: str = "auto"
    damping: float = 1.0
    fixed_iterations: int = 0
    momentum: bool = False
    radius: float = 0.5
    most_directions: int = 0
    window: int = 0
    regularization: float = 0.0
    rank_tolerance: float = 0.0
    max_weight: float = 0.0
    safeguard: float = 0.0
    accelerate_above: float = 0.0
    restart: int = 0

    @classmethod
    def of(
        cls, solver: Solver, *, tol: float, max_iter: int, precision: str = "auto"
    ) -> SolveOptions:
        """The options of a registered solver."""
        fields = dataclasses.fields(solver)  # type: ignore[arg-type]
        own = {f.name: getattr(solver, f.name) for f in fields}
        return cls(solver.name, tol, max_iter, solver.patience, precision, **own)

    @property
    def updates(self) -> int:
        """The most updates of a sample; exactly so many where ``fixed_iterations`` is not 0."""
        return self.fixed_iterations or self.max_iter

    def solver_arguments(self, kind: type[Any]) -> dict[str, Any]:
        """The fields that are options of the solver class ``kind``."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(kind)}

    def arguments(self) -> tuple[Any, ...]:
        """All fields, in the order of an operator's schema."""
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))


#: The fields as arguments of an operator's schema.
SCHEMA = ", ".join(f"{f.type} {f.name}" for f in dataclasses.fields(SolveOptions))
