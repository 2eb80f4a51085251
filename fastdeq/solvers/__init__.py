"""The solvers, their names, and the order in which ``"auto"`` considers them."""

from __future__ import annotations

from collections.abc import Callable

from ..choices import check_choice
from .anderson import Anderson
from .base import Solver, Step, Structure
from .energy import Energy
from .gmres import GMRES
from .heavy_ball import HeavyBall
from .minres import MINRES
from .neumann import Neumann
from .picard import Picard

_ALL: tuple[type[Solver], ...] = (Picard, Anderson, HeavyBall, Energy, Neumann, GMRES, MINRES)
SOLVERS: dict[str, type[Solver]] = {s.name: s for s in _ALL}
FORWARD = tuple(name for name, s in SOLVERS.items() if not s.linear)
ADJOINT = tuple(name for name in SOLVERS if name != "energy")  # which descends on a forward energy
_INSIDE = ("energy", "minres")  # look inside an affine cell


def _contracts(structure: Structure) -> bool:
    bound = structure.contraction
    if bound is not None and "orthogonal" in structure.tags and structure.affine:
        return bound < 1  # on a circle of eigenvalues no acceleration pays, however near to 1
    return bound is not None and bound <= 0.9


def _symmetric(structure: Structure) -> bool:
    return structure.affine and "symmetric" in structure.tags


def _affine(structure: Structure) -> bool:
    return structure.affine


def _energetic(structure: Structure) -> bool:
    return structure.affine and structure.tags >= Energy.needs


def _any(structure: Structure) -> bool:
    return True


# "auto" is the first whose condition holds. docs/how-it-works.md has the measurements behind it.
# In an affine cell a plain step is cheap: acceleration, at 1.1 (d = 512) to 2.5 times its cost
# (d = 64), pays where the residual falls slowly. A plain step of a general map is not known to be
# cheap, so every one is accelerated. An adjoint is linear, and a longer history helps more. A real
# spectrum lets heavy-ball steps do as well as a history, at the price of plain ones.
_AUTO_FORWARD: tuple[tuple[Callable[[Structure], bool], Solver], ...] = (
    (_energetic, Energy(momentum=True)),
    (_contracts, Picard()),
    (_symmetric, Anderson(accelerate_above=0.7)),
    (_affine, Anderson(accelerate_above=0.9)),
    (_any, Anderson()),
)
_AUTO_ADJOINT: tuple[tuple[Callable[[Structure], bool], Solver], ...] = (
    (_energetic, MINRES(momentum=True)),
    (_contracts, Neumann()),
    (_symmetric, Anderson(window=10, accelerate_above=0.7)),
    (_affine, Anderson(window=10, accelerate_above=0.9)),
    (_any, Anderson(window=10)),
)


def choose(solver: str | Solver, structure: Structure, tol: float, *, adjoint: bool) -> Solver:
    """Turns a name, ``"auto"`` or a solver object into a solver object for a map of ``structure``.

    Raises:
        ValueError: as ``named`` does; a solver that needs more structure than the map has.
        TypeError: as ``named`` does.
    """
    if solver == "auto":
        ordered = _AUTO_ADJOINT if adjoint else _AUTO_FORWARD
        return next(solver for holds, solver in ordered if holds(structure))
    chosen = named(solver, adjoint=adjoint)
    missing: frozenset[str] = getattr(chosen, "needs", frozenset()) - structure.tags
    if missing or (chosen.name in _INSIDE and not structure.affine):
        raise ValueError(
            f"solver {chosen.name!r} needs an AffineCell with a symmetric weight (such as "
            'weight="symmetric") and a monotone activation, solved as one; '
            + (
                f"this map is not known to be {', '.join(sorted(missing))}."
                if structure.affine
                else "this one is solved as a general map: it is no AffineCell, or has hooks, "
                "overridden methods, further arguments, or a solver class of your own."
            )
        )
    return chosen.resolved(structure, tol) if isinstance(chosen, Picard) else chosen


def named(solver: str | Solver, *, adjoint: bool) -> Solver:
    """Turns a name or a solver object into a solver object.

    Raises:
        ValueError: unknown name, or a solver for linear maps asked to solve the forward problem,
            or the other way round.
        TypeError: an object without ``init`` and ``step``.
    """
    what = "adjoint solver" if adjoint else "solver"
    valid = ADJOINT if adjoint else FORWARD
    if isinstance(solver, str):
        check_choice(solver, ("auto", *valid), what)
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
    if adjoint and solver.name == "energy":
        raise ValueError(
            f"solver 'energy' solves forward problems only; valid choices: "
            f"{', '.join(map(repr, ADJOINT))}."
        )
    return solver


__all__ = [
    "ADJOINT",
    "FORWARD",
    "GMRES",
    "MINRES",
    "SOLVERS",
    "Anderson",
    "Energy",
    "HeavyBall",
    "Neumann",
    "Picard",
    "Solver",
    "Step",
    "Structure",
    "choose",
    "named",
]
