"""fastdeq: fast and dependable deep equilibrium models for PyTorch."""

from __future__ import annotations

from .activations import ACTIVATIONS, Activation
from .cells import AffineCell
from .functional import fixed_point
from .layer import DEQLayer
from .ops import BackendError
from .parametrizations import OrthogonalMap, SymmetricMap
from .solution import ConvergenceError, ConvergenceWarning, Solution, Status
from .solvers import GMRES, MINRES, Anderson, Energy, HeavyBall, Neumann, Picard
from .weights import Dense, Orthogonal, Symmetric

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "GMRES",
    "MINRES",
    "Activation",
    "AffineCell",
    "Anderson",
    "BackendError",
    "ConvergenceError",
    "ConvergenceWarning",
    "DEQLayer",
    "Dense",
    "Energy",
    "HeavyBall",
    "Neumann",
    "Orthogonal",
    "OrthogonalMap",
    "Picard",
    "Solution",
    "Status",
    "Symmetric",
    "SymmetricMap",
    "fixed_point",
]
