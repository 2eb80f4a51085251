"""The options of one solve of an affine cell, as operators, C++ and Triton take them: named fields.

An operator's schema has one argument for each field, of the same name and type; C++ reads them by
name into a struct of the same fields (csrc/common/solve_options.h).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..constants import FIRST_RADIUS, PATIENCE_LIMIT

if TYPE_CHECKING:
    from .base import Solver


PRECISIONS = ("auto", "float32", "mixed")
#: Solvers without compiled code, for maps of any kind.
PYTHON_SOLVERS = ("broyden", "newton_krylov", "bicgstab", "peaceman_rachford")


@dataclass(frozen=True)
class SolveOptions:
    """A solver with its options, tolerance and limits. An option that the solver does not have
    keeps its default and means nothing."""

    solver: str
    tol: float
    max_iter: int
    patience: int
    atol: float = 0.0
    precision: str = "auto"
    damping: float = 1.0
    fixed_iterations: int = 0
    momentum: bool = False
    radius: float = FIRST_RADIUS
    most_directions: int = 0
    window: int = 0
    first_window: int = 0
    regularization: float = 0.0
    rank_tolerance: float = 0.0
    max_weight: float = 0.0
    safeguard: float = 0.0
    accelerate_above: float = 0.0
    min_iter: int = 0
    restart: int = 0
    memory: int = 0
    kind: str = "II"
    difference: float = 0.0
    alpha: float = 0.0
    stop_norm: str = "2"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            names = ", ".join(map(repr, PRECISIONS))
            raise ValueError(f"precision must be one of {names}, got {self.precision!r}.")

    @classmethod
    def of(
        cls,
        solver: Solver,
        *,
        tol: float,
        max_iter: int,
        atol: float = 0.0,
        patience: int | None = None,
        precision: str = "auto",
        min_iter: int = 0,
        stop_norm: str = "2",
    ) -> SolveOptions:
        """The options of a registered solver; of another one what it shares with those. No sample
        converges before ``min_iter`` updates.
        ``patience`` is the solver's, scaled to ``max_iter``, unless it is given."""
        fields: Any = dataclasses.fields(solver) if dataclasses.is_dataclass(solver) else ()
        own = {f.name: getattr(solver, f.name) for f in fields if f.name in FIELDS}
        if patience is None:
            patience = scaled_patience(solver.patience, max_iter)
        own |= {"min_iter": min_iter, "stop_norm": stop_norm}
        return cls(solver.name, tol, max_iter, patience, atol, precision, **own)

    @property
    def why_plain_pytorch(self) -> str:
        """Why no compiled code makes these iterations; "" where some may."""
        if self.solver in PYTHON_SOLVERS:
            return f"solver {self.solver!r} is in plain PyTorch alone"
        if self.kind != "II":
            return "Anderson acceleration of type I is in plain PyTorch alone"
        return "" if self.stop_norm == "2" else "stop_norm='max' is in plain PyTorch alone"

    @property
    def updates(self) -> int:
        """The most updates of a sample; exactly so many where ``fixed_iterations`` is not 0."""
        return self.fixed_iterations or self.max_iter

    @property
    def most_differences(self) -> int:
        """Differences that Anderson acceleration can use: never more than there are updates."""
        return min(self.window, self.updates)

    def solver_arguments(self, kind: type[Any]) -> dict[str, Any]:
        """The fields that are options of the solver class ``kind``."""
        names = (f.name for f in dataclasses.fields(kind))
        return {name: getattr(self, name) for name in names if name in FIELDS}

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All fields, in the order of an operator's schema."""
        return tuple([getattr(self, name) for name in FIELDS])


def scaled_patience(patience: int, max_iter: int) -> int:
    """A solver's patience for a solve with this limit: who allows more updates is in less of a
    hurry."""
    return max(patience, min(patience * max_iter // PATIENCE_LIMIT, 2**31 - 2))


#: Names of the fields, in their order.
FIELDS = tuple(f.name for f in dataclasses.fields(SolveOptions))

#: The fields as arguments of an operator's schema.
SCHEMA = ", ".join(f"{f.type} {f.name}" for f in dataclasses.fields(SolveOptions))
