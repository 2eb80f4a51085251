"""Spectra of a model at hand, without forming a Jacobian, each with the accuracy it has reached."""

from __future__ import annotations

from .estimate import Estimate
from .jacobian import jacobian_norm, spectral_radius
from .penalty import jacobian_penalty
from .symmetric import EigenvalueBounds, eigenvalue_bounds

__all__ = [
    "EigenvalueBounds",
    "Estimate",
    "eigenvalue_bounds",
    "jacobian_norm",
    "jacobian_penalty",
    "spectral_radius",
]
