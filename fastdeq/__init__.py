"""fastdeq: fast and dependable deep equilibrium models for PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import init as init
from . import ops as ops  # registers the operators
from .activations import ACTIVATIONS, Activation
from .cells import AffineCell
from .errors import BackendError, CoupledSamplesError, ExtensionWarning
from .failure import ConvergenceError, ConvergenceWarning
from .functional import fixed_point
from .gradients import Phantom, Reversible, Truncated, Unrolled
from .layer import DEQLayer
from .solution import Solution, Status
from .solvers import (
    GMRES,
    MINRES,
    Anderson,
    BiCGStab,
    Broyden,
    Energy,
    HeavyBall,
    Neumann,
    NewtonKrylov,
    PeacemanRachford,
    Picard,
)
from .trajectory import trajectory
from .weights import Dense, Orthogonal, OrthogonalMap, Symmetric, SymmetricMap

if TYPE_CHECKING:
    from . import diagnostics as diagnostics
    from . import theory as theory
    from .diagnostics import jacobian_penalty, recommend, spectral_radius
else:

    def __getattr__(name):
        """``fastdeq.diagnostics`` and its functions that training uses, and ``fastdeq.theory``,
        when they are first looked for: a solve does not need them."""
        import importlib

        if name in ("diagnostics", "theory"):
            return importlib.import_module(f".{name}", __name__)
        if name in ("jacobian_penalty", "recommend", "spectral_radius"):
            return getattr(importlib.import_module(".diagnostics", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "GMRES",
    "MINRES",
    "Activation",
    "AffineCell",
    "Anderson",
    "BackendError",
    "BiCGStab",
    "Broyden",
    "ConvergenceError",
    "ConvergenceWarning",
    "CoupledSamplesError",
    "DEQLayer",
    "Dense",
    "Energy",
    "ExtensionWarning",
    "HeavyBall",
    "Neumann",
    "NewtonKrylov",
    "Orthogonal",
    "OrthogonalMap",
    "PeacemanRachford",
    "Phantom",
    "Picard",
    "Reversible",
    "Solution",
    "Status",
    "Symmetric",
    "SymmetricMap",
    "Truncated",
    "Unrolled",
    "fixed_point",
    "init",
    "jacobian_penalty",
    "recommend",
    "spectral_radius",
    "trajectory",
]
