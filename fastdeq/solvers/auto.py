"""What ``"auto"`` means: the solvers in the order in which they are considered for a structure.

docs/how-it-works.md has the measurements behind the order. In an affine cell a plain step is cheap:
acceleration, at 1.1 (d = 512) to 2.5 times its cost (d = 64), pays where the residual falls slowly.
A step of a general map is not known to be cheap, but a history costs memory, and time where states
are large: it is short until a solve turns out to be hard. The residual of a map that is only
piecewise smooth jumps where it changes pieces, so the safeguard is loose: of 800 linear programs
solved by Douglas-Rachford splitting 627 converge within 100 iterations, 618 with a safeguard
of 2; on smooth maps it makes no difference. An adjoint is linear, and a longer history helps more.
A real spectrum lets heavy-ball steps, with which Energy and MINRES begin where
``momentum`` is set, do as well as a history at the price of plain ones.
"""

from __future__ import annotations

from collections.abc import Callable

from .anderson import Anderson
from .base import Solver, Structure
from .energy import Energy
from .minres import MINRES
from .neumann import Neumann
from .picard import Picard


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


#: "auto" is the first whose condition holds.
FORWARD_ORDER: tuple[tuple[Callable[[Structure], bool], Solver], ...] = (
    (_energetic, Energy(momentum=True)),
    (_contracts, Picard()),
    (_symmetric, Anderson(accelerate_above=0.7)),
    (_affine, Anderson(accelerate_above=0.9)),
    (_any, Anderson(window=10, first_window=2, accelerate_above=0.4, safeguard=100.0)),
)
ADJOINT_ORDER: tuple[tuple[Callable[[Structure], bool], Solver], ...] = (
    (_energetic, MINRES(momentum=True)),
    (_contracts, Neumann()),
    (_symmetric, Anderson(window=10, accelerate_above=0.7)),
    (_affine, Anderson(window=10, accelerate_above=0.9)),
    (_any, Anderson(window=10, first_window=2, accelerate_above=0.4)),
)


def automatic(structure: Structure, *, adjoint: bool) -> Solver:
    """The solver that "auto" stands for."""
    order = ADJOINT_ORDER if adjoint else FORWARD_ORDER
    return next(solver for holds, solver in order if holds(structure))
