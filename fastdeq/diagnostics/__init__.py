"""Spectra of a model at hand, without forming a Jacobian, each with the accuracy it has reached."""

from __future__ import annotations

from ..diagnosis import Diagnosis, ParameterGradient, Recommendation
from ..estimate import Estimate
from .jacobian import jacobian_norm, spectral_radius
from .penalty import jacobian_penalty
from .recommending import Recommendations, recommend
from .symmetric import EigenvalueBounds, eigenvalue_bounds

__all__ = [
    "Diagnosis",
    "EigenvalueBounds",
    "Estimate",
    "ParameterGradient",
    "Recommendation",
    "Recommendations",
    "eigenvalue_bounds",
    "jacobian_norm",
    "jacobian_penalty",
    "recommend",
    "spectral_radius",
]
