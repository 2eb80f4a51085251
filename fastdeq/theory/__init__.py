"""Predictions for deep equilibrium models of large width with random weights.

Closed forms for the linear cell ``z = W z + c`` and mean field for ``z = phi(W z + c)``, with
dense, orthogonal and symmetric weights. ``scale`` is fastdeq's, the spectral radius. The starting
point is the claim of Agarwala and Schoenholz (Deep equilibrium networks are sensitive to
initialization statistics, ICML 2022): that DEQs are sensitive to the higher-order statistics of
their weights, and that orthogonal and symmetric ones train stably over a broader range of scales.
The formulas are derived, or their classical source is named, where they stand. All are limits of
large width. Numbers may be those of NumPy, or tensors of one element; what is no number raises
TypeError.
"""

from __future__ import annotations

from .conventions import entry_scale, spectral_radius
from .fluctuations import effective_width, trace_variation, variation
from .linear import (
    fourth_moment,
    overlap,
    untied_fourth_moment,
    untied_variance,
    variance,
    weight_gradient_moment,
)
from .mean_field import Equilibrium, equilibrium
from .resolvent import eigenvalue_boundary, eigenvalue_density, resolvent_norm, weight_norm
from .stability import edge_of_stability, equilibrium_length, jacobian_radius, mean_square_slope

__all__ = [
    "Equilibrium",
    "edge_of_stability",
    "effective_width",
    "eigenvalue_boundary",
    "eigenvalue_density",
    "entry_scale",
    "equilibrium",
    "equilibrium_length",
    "fourth_moment",
    "jacobian_radius",
    "mean_square_slope",
    "overlap",
    "resolvent_norm",
    "spectral_radius",
    "trace_variation",
    "untied_fourth_moment",
    "untied_variance",
    "variance",
    "variation",
    "weight_gradient_moment",
    "weight_norm",
]
