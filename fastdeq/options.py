"""The options of a solve and its gradient, checked once at the public edge."""

from __future__ import annotations

import contextlib
import math
import numbers
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from .backends.choose import BACKENDS
from .backends.choose import Backend as Backend
from .errors import check_choice
from .failure import ON_FAILURE
from .failure import OnFailure as OnFailure
from .gradients import GRADIENTS as GRADIENTS
from .gradients import Gradient as Gradient
from .gradients import GradientMethod, check_together, named_gradient
from .samples import BatchDim as BatchDim
from .samples import Compact as Compact
from .samples import check_batch_dim, check_compact
from .solvers import ADJOINT, FORWARD, SOLVERS, Broyden, Solver, named
from .solvers.solve_options import PRECISIONS

#: A state: what a map takes and returns, a tensor or a structure of them.
State = TypeVar("State")
SolverName = Literal[
    "auto",
    "picard",
    "anderson",
    "broyden",
    "heavy_ball",
    "newton_krylov",
    "energy",
    "peaceman_rachford",
]
AdjointName = Literal[
    "auto", "picard", "anderson", "broyden", "heavy_ball", "neumann", "gmres", "bicgstab", "minres"
]
Precision = Literal["auto", "float32", "mixed"]
#: The norm of the criterion of convergence: that of all entries, or the largest of them.
StopNorm = Literal["2", "max"]
STOP_NORMS: tuple[StopNorm, ...] = get_args(StopNorm)
#: Whether the evaluations of one solve and its gradient draw different random numbers, or the same.
Randomness = Literal["different", "same"]
RANDOMNESS: tuple[Randomness, ...] = get_args(Randomness)

# Options that a layer shows where they are not these.
_SHOWN = (
    ("gradient", "implicit"),
    ("adjoint_limit", None),
    ("batch_dim", 0),
    ("compact", False),
    ("has_aux", False),
    ("randomness", "different"),
)

#: The largest iteration limit: the engines count updates, and one evaluation more, in 32 bits.
MOST_ITERATIONS = 2**31 - 2


@dataclass(frozen=True)
class Options:
    """Options shared by ``DEQLayer`` and ``fixed_point``; see ``DEQLayer`` for their meaning."""

    solver: SolverName | Solver = "auto"
    adjoint: AdjointName | Solver = "auto"
    gradient: Gradient | GradientMethod = "implicit"
    adjoint_limit: float | None = None
    batch_dim: BatchDim = 0
    compact: Compact = False
    has_aux: bool = False
    randomness: Randomness = "different"
    tol: float = 1e-4
    adjoint_tol: float | None = None
    atol: float = 0.0
    adjoint_atol: float = 0.0
    stop_norm: StopNorm = "2"
    min_iter: int = 0
    max_iter: int = 100
    adjoint_max_iter: int | None = None
    patience: int | None = None
    precision: Precision = "auto"
    backend: Backend = "auto"
    on_failure: OnFailure = "warn"
    registered: bool = field(init=False, repr=False)
    """Whether the operators know both solvers by name, so that a whole solve may be one call, which
    has no auxiliary outputs."""

    def __post_init__(self) -> None:
        registered = not self.has_aux
        for name, adjoint in (("solver", False), ("adjoint", True)):
            given = getattr(self, name)
            if given != "auto":  # an object from now on: a compiled layer does not build any
                _check_direction(given, adjoint=adjoint)
                chosen = named(given, adjoint=adjoint)
                registered &= SOLVERS.get(chosen.name) is type(chosen)
                object.__setattr__(self, name, chosen)
        if getattr(self.solver, "reuse", False):
            raise ValueError("Broyden(reuse=True) is an adjoint solver: pass it as adjoint=.")
        if getattr(self.adjoint, "reuse", False):
            if not isinstance(self.solver, Broyden):
                raise ValueError(
                    'adjoint=Broyden(reuse=True) needs solver="broyden", whose inverse it begins '
                    f"with, not {self.solver!r}."
                )
            registered = False  # the operators hand nothing on
        object.__setattr__(self, "registered", registered)
        object.__setattr__(self, "batch_dim", check_batch_dim(self.batch_dim))
        object.__setattr__(self, "compact", check_compact(self.compact, self.batch_dim))
        object.__setattr__(self, "gradient", named_gradient(self.gradient))
        check_choice(self.stop_norm, STOP_NORMS, "stop_norm")
        if self.stop_norm != "2" and (self.compact or self.precision == "mixed"):
            raise ValueError(
                'stop_norm="max" goes with neither compact nor precision="mixed", which compare '
                "2-norms."
            )
        check_choice(self.randomness, RANDOMNESS, "randomness")
        if not isinstance(self.has_aux, bool):
            raise ValueError(f"has_aux must be True or False, got {self.has_aux!r}.")
        check_choice(self.precision, PRECISIONS, "precision")
        check_choice(self.backend, BACKENDS, "backend")
        check_choice(self.on_failure, ON_FAILURE, "on_failure")
        for name in ("tol", "adjoint_tol", "atol", "adjoint_atol"):
            if (tolerance := getattr(self, name)) is not None or name != "adjoint_tol":
                object.__setattr__(self, name, _tolerance(name, tolerance))
        for name in ("max_iter", "adjoint_max_iter", "patience"):
            if (limit := getattr(self, name)) is not None or name == "max_iter":
                object.__setattr__(self, name, _limit(name, limit))
        if self.min_iter != 0:
            object.__setattr__(self, "min_iter", _least(self.min_iter, self.max_iter))
            if self.min_iter and (fixed := getattr(self.solver, "fixed_iterations", 0)):
                raise ValueError(
                    f"min_iter={self.min_iter} has no effect on fixed_iterations={fixed!r}, which "
                    "makes exactly so many updates: leave min_iter out, or fixed_iterations."
                )

        if self.adjoint_limit is not None:
            object.__setattr__(self, "adjoint_limit", check_adjoint_limit(self.adjoint_limit))
        if self.gradient != "implicit" or self.adjoint_limit is not None:
            solver, precision = check_together(
                self.gradient,
                self.solver,
                self.precision,
                self.backend,
                self.compact,
                self.adjoint_limit,
            )
            object.__setattr__(self, "solver", solver)
            object.__setattr__(self, "precision", precision)

    def shown(self) -> str:
        """What a layer shows of them."""
        shown = (
            f"solver={self.solver!r}, adjoint={self.adjoint!r}, tol={self.tol:g}, "
            f"max_iter={self.max_iter}"
        )
        for name, default in _SHOWN:
            if (value := getattr(self, name)) != default:
                shown += f", {name}={value!r}"
        return shown

    def adjoint_limits(self) -> dict[str, Any]:
        """Tolerances and iteration limit of the adjoint; the relative tolerance and the limit of
        the forward solve where unset."""
        tol = self.tol if self.adjoint_tol is None else self.adjoint_tol
        max_iter = self.max_iter if self.adjoint_max_iter is None else self.adjoint_max_iter
        return {"tol": tol, "atol": self.adjoint_atol, "max_iter": max_iter}


def _check_direction(solver: object, *, adjoint: bool) -> None:
    """Raises ValueError for a solver, by name or as an object, of the other direction."""
    name = solver if isinstance(solver, (str, type)) else getattr(solver, "name", None)
    there, here = (FORWARD, ADJOINT) if adjoint else (ADJOINT, FORWARD)
    if name not in there or name in here:
        return
    this, other = ("adjoint", "solver") if adjoint else ("solver", "adjoint")
    what = "forward problems" if adjoint else "the linear system of the gradient"
    given = repr(name if isinstance(solver, str) else solver)
    raise ValueError(
        f"{name!r} solves {what} only: pass {other}={given} instead of {this}={given}; "
        f"valid choices for {this}: {', '.join(map(repr, ('auto', *here)))}."
    )


def _tolerance(name: str, value: object) -> float:
    """``value`` as a float; raises ValueError unless it is a finite number >= 0."""
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond the largest float
            number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0 such as 1e-4, got {value!r}.")
    return number


def _least(value: object, most: int) -> int:
    """``value`` as an int; raises ValueError unless it is one from 0 to ``most``."""
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integer or not 0 <= value <= most:  # type: ignore[operator]
        raise ValueError(
            f"min_iter must be an integer from 0 to max_iter, here {most}, got {value!r}."
        )
    return int(value)  # type: ignore[call-overload, no-any-return]


def check_adjoint_limit(value: object) -> float:
    """``value`` as a float; raises ValueError unless it is a number >= 1."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 1 <= value < math.inf:  # type: ignore[operator]
        raise ValueError(
            "adjoint_limit must be a finite number >= 1 such as 10.0, the most that the adjoint of "
            f"a sample may exceed its gradient by, or None, got {value!r}."
        )
    return float(value)  # type: ignore[arg-type]


def _limit(name: str, value: object) -> int:
    """``value`` as an int; raises ValueError unless it is one that the engines can count to."""
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integer or not 1 <= value <= MOST_ITERATIONS:  # type: ignore[operator]
        raise ValueError(
            f"{name} must be an integer from 1 to {MOST_ITERATIONS}, such as 100, got {value!r}."
        )
    return int(value)  # type: ignore[call-overload, no-any-return]
