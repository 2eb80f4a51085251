"""The edge of stability: the scale at which the Jacobian's spectral radius reaches 1."""

from __future__ import annotations

import math

from ..activations import Activation
from ..conventions import check_convention, in_convention
from .conventions import check_size, check_weight
from .mean_field import equilibrium, find_activation

_LARGEST = 1e3
_GROWTH = 1.1


def equilibrium_length(
    weight: str, activation: str | Activation, scale: float, injection_variance: float = 1.0
) -> float:
    """``|z*|^2 / d`` by mean field; arguments and errors as of :func:`equilibrium`."""
    return equilibrium(weight, activation, scale, injection_variance).length


def mean_square_slope(
    weight: str, activation: str | Activation, scale: float, injection_variance: float = 1.0
) -> float:
    """``E phi'^2`` by mean field; arguments and errors as of :func:`equilibrium`."""
    return equilibrium(weight, activation, scale, injection_variance).mean_square_slope


def jacobian_radius(
    weight: str, activation: str | Activation, scale: float, injection_variance: float = 1.0
) -> float:
    """The spectral radius of the Jacobian ``D W`` at the equilibrium, by mean field; arguments and
    errors as of :func:`equilibrium`."""
    return equilibrium(weight, activation, scale, injection_variance).jacobian_radius


def edge_of_stability(
    weight: str,
    activation: str | Activation,
    injection_variance: float = 1.0,
    convention: str = "spectral_radius",
) -> float:
    """The smallest scale at which the Jacobian's spectral radius at the equilibrium reaches 1.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        activation: as of :func:`equilibrium`.
        injection_variance: of the entries of c, finite and not negative; the same at all scales.
        convention: "spectral_radius", fastdeq's ``scale``, or "variance", the entry scale e
            (entries of variance ``e^2 / d``).

    Returns:
        The scale, to 1e-5 of itself or better; infinity where the radius stays below 1 up to a
        scale of 1000. Dense and orthogonal weights have the same edge, ``s^2 E phi'^2 = 1`` unless
        an outlier comes first; for relu it is ``sqrt(2)``. The edge of symmetric ones is where
        ``e^2 E[(phi' / (1 - a phi'))^2] = 1`` (de Almeida and Thouless, J. Phys. A 11 (1978) 983).
        A scale at which the length of the state has no finite value counts as beyond the edge.

    Raises:
        ValueError: unknown names; injection variance out of range; symmetric weights with an
            activation that is not monotone.
    """
    phi = find_activation(check_weight(weight), activation)
    check_convention(convention)
    injected = check_size(injection_variance, "injection_variance")

    def stable(scale: float) -> bool:
        try:
            return equilibrium(weight, phi, scale, injected).stable
        except ValueError:  # names and numbers are valid: no finite length, or no single state
            return False

    # The bulk's radius is at most the scale times the largest slope.
    low = (1 - 1e-9) / phi.lipschitz
    while not stable(low):
        low /= _GROWTH
    high = low * _GROWTH
    while stable(high):
        low, high = high, high * _GROWTH
        if high > _LARGEST:
            return math.inf
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if stable(middle) else (low, middle)
    return in_convention(weight, high, convention)
