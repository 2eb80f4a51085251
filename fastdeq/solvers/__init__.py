"""The solvers by name, and how a name becomes a solver object for a structure."""

from __future__ import annotations

from ..errors import check_choice
from .anderson import Anderson
from .auto import automatic
from .base import Solver, Step, Structure
from .bicgstab import BiCGStab
from .broyden import Broyden
from .energy import Energy
from .gmres import GMRES
from .heavy_ball import HeavyBall
from .minres import MINRES
from .neumann import Neumann
from .newton_krylov import NewtonKrylov
from .peaceman_rachford import PeacemanRachford
from .picard import Picard
from .solve_options import SolveOptions

_ALL: tuple[type[Solver], ...] = (
    Picard,
    Anderson,
    Broyden,
    HeavyBall,
    NewtonKrylov,
    Energy,
    PeacemanRachford,
    Neumann,
    GMRES,
    BiCGStab,
    MINRES,
)
SOLVERS: dict[str, type[Solver]] = {s.name: s for s in _ALL}
FORWARD = tuple(name for name, s in SOLVERS.items() if not s.linear)
# Of forward problems alone: two look at the activation, one is GMRES where f is affine.
_NONLINEAR = ("energy", "newton_krylov", "peaceman_rachford")
ADJOINT = tuple(name for name in SOLVERS if name not in _NONLINEAR)
_INSIDE = ("energy", "minres", "peaceman_rachford")  # look inside an affine cell


def resolve(solver: str | Solver, structure: Structure, tol: float, *, adjoint: bool) -> Solver:
    """Turns a name, ``"auto"`` or a solver object into a solver object for a map of ``structure``.

    Raises:
        ValueError: as ``named`` does; a solver that needs more structure than the map has.
        TypeError: as ``named`` does.
    """
    if solver == "auto":
        return automatic(structure, adjoint=adjoint)
    chosen = named(solver, adjoint=adjoint)
    missing: frozenset[str] = getattr(chosen, "needs", frozenset()) - structure.tags
    symmetric = "symmetric" in getattr(chosen, "needs", ())
    if missing or (chosen.name in _INSIDE and not structure.affine):
        raise ValueError(
            f"solver {chosen.name!r} needs an AffineCell with "
            + ('a symmetric weight (such as weight="symmetric") and ' if symmetric else "")
            + "a monotone activation, solved as one; "
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
    if adjoint and solver.name in _NONLINEAR:
        raise ValueError(
            f"solver {solver.name!r} solves forward problems only; valid choices: "
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
    "BiCGStab",
    "Broyden",
    "Energy",
    "HeavyBall",
    "Neumann",
    "NewtonKrylov",
    "PeacemanRachford",
    "Picard",
    "SolveOptions",
    "Solver",
    "Step",
    "Structure",
    "named",
    "resolve",
]
