"""The options of a solve and its gradient, checked once at the public edge."""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass, field

from .backends.choose import BACKENDS
from .errors import check_choice, check_options
from .solution import ON_FAILURE
from .solvers import SOLVERS, Solver, named
from .solvers.solve_options import PRECISIONS

GRADIENTS = ("implicit", "one_step")


@dataclass(frozen=True)
class Options:
    """Options shared by ``DEQLayer`` and ``fixed_point``; see ``DEQLayer`` for their meaning."""

    solver: str | Solver = "auto"
    adjoint: str | Solver = "auto"
    gradient: str = "implicit"
    tol: float = 1e-4
    adjoint_tol: float | None = None
    max_iter: int = 100
    adjoint_max_iter: int | None = None
    precision: str = "auto"
    backend: str = "auto"
    on_failure: str = "warn"
    registered: bool = field(init=False, repr=False)
    """Whether the operators know both solvers by name, so that a whole solve is one call."""

    def __post_init__(self) -> None:
        registered = True
        for name, adjoint in (("solver", False), ("adjoint", True)):
            given = getattr(self, name)
            if given != "auto":  # an object from now on: a compiled layer does not build any
                chosen = named(given, adjoint=adjoint)
                registered &= SOLVERS.get(chosen.name) is type(chosen)
                object.__setattr__(self, name, chosen)
        object.__setattr__(self, "registered", registered)
        check_choice(self.gradient, GRADIENTS, "gradient")
        check_choice(self.precision, PRECISIONS, "precision")
        check_choice(self.backend, BACKENDS, "backend")
        check_choice(self.on_failure, ON_FAILURE, "on_failure")
        self._check_tolerance("tol", self.tol)
        self._check_limit("max_iter", self.max_iter)
        object.__setattr__(self, "tol", float(self.tol))
        object.__setattr__(self, "max_iter", int(self.max_iter))
        if self.adjoint_tol is not None:
            self._check_tolerance("adjoint_tol", self.adjoint_tol)
        if self.adjoint_max_iter is not None:
            self._check_limit("adjoint_max_iter", self.adjoint_max_iter)

    def adjoint_limits(self) -> tuple[float, int]:
        """Tolerance and iteration limit of the adjoint; those of the forward solve where unset."""
        tol = self.tol if self.adjoint_tol is None else self.adjoint_tol
        max_iter = self.max_iter if self.adjoint_max_iter is None else self.adjoint_max_iter
        return float(tol), int(max_iter)

    @classmethod
    def checked(cls, owner: str, unknown: dict[str, object], **options: object) -> Options:
        """Builds the options of ``owner``, refusing keyword arguments it does not know."""
        check_options(unknown, (f.name for f in dataclasses.fields(cls) if f.init), owner)
        return cls(**options)  # type: ignore[arg-type]

    @staticmethod
    def _check_tolerance(name: str, value: object) -> None:
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:  # type: ignore[operator]
            raise ValueError(f"{name} must be a finite number >= 0 such as 1e-4, got {value!r}.")

    @staticmethod
    def _check_limit(name: str, value: object) -> None:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
