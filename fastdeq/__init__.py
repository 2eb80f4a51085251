"""fastdeq: fast and dependable deep equilibrium models for PyTorch."""

from __future__ import annotations

from . import ops as ops  # registers the operators
from .activations import ACTIVATIONS, Activation
from .cells import AffineCell
from .errors import BackendError, ExtensionWarning
from .functional import fixed_point
from .layer import DEQLayer
from .solution import ConvergenceError, ConvergenceWarning, Solution, Status
from .solvers import GMRES, MINRES, Anderson, Energy, HeavyBall, Neumann, Picard
from .weights import Dense, Orthogonal, OrthogonalMap, Symmetric, SymmetricMap

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
    "ExtensionWarning",
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
