"""The solvers, their names, and the order in which ``"auto"`` considers them."""

from __future__ import annotations

from collections.abc import Callable

from ..choices import check_choice
from .anderson import Anderson
from .base import Solver, Step, Structure
from .gmres import GMRES
from .neumann import Neumann
from .picard import Picard

SOLVERS: dict[str, type[Solver]] = {s.name: s for s in (Picard, Anderson, Neumann, GMRES)}
FORWARD = tuple(name for name, s in SOLVERS.items() if not s.linear)
ADJOINT = tuple(SOLVERS)


def _contracts(structure: Structure) -> bool:
    return structure.contraction is not None and structure.contraction <= 0.9


def _symmetric(structure: Structure) -> bool:
    return structure.affine and "symmetric" in structure.tags


def _affine(structure: Structure) -> bool:
    return structure.affine


def _any(structure: Structure) -> bool:
    return True


# "auto" is the first whose condition holds. docs/how-it-works.md has the measurements behind it.
# In an affine cell a plain step is cheap: acceleration, at 1.1 (d = 512) to 2.5 times its cost
# (d = 64), pays where the residual falls slowly. A plain step of a general map is not known to be
# cheap, so every one is accelerated. An adjoint is linear, and a longer history helps more.
_AUTO_FORWARD: tuple[tuple[Callable[[Structure], bool], Solver], ...] = (
    (_contracts, Picard()),
    (_symmetric, Anderson(accelerate_above=0.7)),
    (_affine, Anderson(accelerate_above=0.9)),
    (_any, Anderson()),
)
_AUTO_ADJOINT: tuple[tuple[Callable[[Structure], bool], Solver], ...] = (
    (_contracts, Neumann()),
    (_symmetric, Anderson(window=10, accelerate_above=0.7)),
    (_affine, Anderson(window=10, accelerate_above=0.9)),
    (_any, Anderson(window=10)),
)


def choose(solver: str | Solver, structure: Structure, *, adjoint: bool) -> Solver:
    """Turns a name, ``"auto"`` or a solver object into a solver object.

    Raises:
        ValueError: unknown name, or a solver for linear maps asked to solve the forward problem.
        TypeError: an object without ``init`` and ``step``.
    """
    what = "adjoint solver" if adjoint else "solver"
    valid = ADJOINT if adjoint else FORWARD
    if isinstance(solver, str):
        check_choice(solver, ("auto", *valid), what)
        if solver == "auto":
            ordered = _AUTO_ADJOINT if adjoint else _AUTO_FORWARD
            return next(solver for holds, solver in ordered if holds(structure))
        return SOLVERS[solver]()
    if isinstance(solver, type) or not (hasattr(solver, "init") and hasattr(solver, "step")):
        raise TypeError(
            f"{what} must be a name ({', '.join(map(repr, ('auto', *valid)))}) or a solver object "
            f"such as Anderson(window=5), not {solver!r}."
        )
    if solver.linear and not adjoint:
        raise ValueError(
            f"solver {solver.name!r} solves linear systems only; valid choices: "
            f"{', '.join(map(repr, FORWARD))}."
        )
    return solver


__all__ = [
    "ADJOINT",
    "FORWARD",
    "GMRES",
    "SOLVERS",
    "Anderson",
    "Neumann",
    "Picard",
    "Solver",
    "Step",
    "Structure",
    "choose",
]
