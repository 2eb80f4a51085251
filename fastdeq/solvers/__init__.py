"""The solvers, their names, and the order in which ``"auto"`` considers them."""

from __future__ import annotations

from ..choices import check_choice
from .anderson import Anderson
from .base import Solver, Step, Structure
from .gmres import GMRES
from .neumann import Neumann
from .picard import Picard

SOLVERS: dict[str, type[Solver]] = {s.name: s for s in (Picard, Anderson, Neumann, GMRES)}
FORWARD = tuple(name for name, s in SOLVERS.items() if not s.linear)
ADJOINT = tuple(SOLVERS)

# "auto" is the first of these that suits the structure of the map. Measured on 2 CPU cores at
# d = 256, B = 64, tolerance 1e-4, in this plain PyTorch form: a contraction by 0.9 takes plain
# iteration no more steps than Anderson, each at half the cost. For adjoints, Anderson with a window
# of 10 met the tolerance wherever GMRES(40) did (dense to scale 1.3, symmetric to 2, relu 1.2), in
# up to twice its products and a quarter to a half of its time.
_AUTO_FORWARD: tuple[Solver, ...] = (Picard(), Anderson())
_AUTO_ADJOINT: tuple[Solver, ...] = (Neumann(), Anderson(window=10))


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
            return next(s for s in ordered if s.suits(structure))
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
