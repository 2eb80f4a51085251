"""The spectrum of the Jacobian ``D W`` at a mean-field equilibrium: its bulk, and one outlier.

D and W are not independent, as z* depends on W. What ties them is ``W z = p - c``: given it, a
dense W is ``V (I - z z^T / |z|^2) + (p - c) z^T / |z|^2`` with V independent of z, p and D (and an
orthogonal one maps z to p - c, and is uniform between what is at right angles to them). The
perturbation of rank one leaves the bulk alone, and may put one eigenvalue outside of it.

Bulk. D and V are free.
    dense, orthogonal: ``|D V|`` has eigenvalues up to ``e sqrt(E phi'^2)``: D V is R-diagonal
    (Haagerup and Larsen, J. Funct. Anal. 176 (2000) 331; for dense V a matrix with a variance
    profile).
    symmetric: eigenvalues x of ``D^(1/2) W D^(1/2)`` are those of ``x / D - W``, whose inverse has
    the diagonal ``1 / (x / D_i - y)`` with ``y = e^2 E[1 / (x / D - y)]`` (Pastur 1972). As a
    function of ``t = x / y``, ``x^2 = e^2 t^2 E[D / (t - D)]``, and the edge is its smallest value
    for t > max D, where ``E[D / (t - D)] = E[D^2 / (t - D)^2]``.

Outlier x.
    dense, orthogonal: ``z^T (x - D V)^-1 D (p - c) / |z|^2 = 1``. Outside of the bulk the series
    in V leaves ``z^T D (p - c) / (x |z|^2)``, and E[p - c | p] is ``e^2 q p / v``: so
    ``x = (e^2 / v) E[p phi phi'] = e^2 d(E phi^2)/dv``, the slope of the map of lengths.
    symmetric: the eigenvector w is a state that responds to fields n of its own and to those of
    z: ``x w = D (n + y w + e^2 k z)``, with ``k = E dw/dh`` and, for the overlap C = E[w z],
    ``E[n | h] = e^2 C h / v``. By Stein's lemma ``E[w h] = v k + C y``, y as above. With
    ``G = D / (x - y D)`` these are two linear equations for C and k, with a solution where

        ``(1 - e^2 E[G z h] / v)^2 v = e^4 E[G z^2] (E[G h^2] / v - y / e^2)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..activations import Activation
from .quadrature import rule


@dataclass(frozen=True)
class Averages:
    """Means over the pre-activation p of a unit."""

    p: Tensor
    weights: Tensor
    state: Tensor  # phi(p)
    slope: Tensor  # phi'(p)
    variance: float  # of the field h
    reaction: float

    def of(self, values: Tensor) -> float:
        return float(self.weights @ values)

    @property
    def length(self) -> float:
        return self.of(self.state**2)

    @property
    def response(self) -> float:
        """``E dz/dh``."""
        return self.of(self.slope / (1 - self.reaction * self.slope))


@dataclass(frozen=True)
class Jacobian:
    bulk: float
    outlier: float  # 0 where there is none

    @property
    def radius(self) -> float:
        return max(self.bulk, self.outlier)


def averages(phi: Activation, variance: float, reaction: float = 0.0) -> Averages:
    p, weights = rule(variance, reaction, phi.function, phi.slope)
    return Averages(p, weights, phi.function(p), phi.slope(p), variance, reaction)


def jacobian(mean: Averages, e2: float, *, symmetric: bool) -> Jacobian:
    """Bulk and outlier of the spectrum of D W."""
    if e2 == 0:
        return Jacobian(0.0, 0.0)
    if symmetric:
        bulk, y = _symmetric_edge(mean, e2)
        return Jacobian(bulk, _symmetric_outlier(mean, e2, bulk, y))
    bulk = math.sqrt(e2 * mean.of(mean.slope**2))
    deviation = mean.weights @ (mean.p * mean.state * mean.slope)
    outlier = abs(e2 * float(deviation) / mean.variance) if mean.variance > 0 else 0.0
    return Jacobian(bulk, outlier if outlier > bulk else 0.0)


def _symmetric_edge(mean: Averages, e2: float) -> tuple[float, float]:
    """The bulk's edge x, and y there."""
    slope = mean.slope
    largest = float(slope.max())
    if largest == 0:
        return 0.0, 0.0

    def beyond(log_gap: float) -> float:
        ratio = slope / (largest * (1 + math.exp(log_gap)) - slope)
        return mean.of(ratio) - mean.of(ratio**2)

    gap = math.exp(_bisect(beyond, -25.0, 25.0))
    t = largest * (1 + gap)
    x = math.sqrt(e2) * t * math.sqrt(mean.of(slope / (t - slope)))
    return x, x / t


def _symmetric_outlier(mean: Averages, e2: float, bulk: float, y_edge: float) -> float:
    v = mean.variance
    if v == 0 or bulk == 0:
        return 0.0
    h = mean.p - mean.reaction * mean.state
    z = mean.state

    def determinant(t: float) -> tuple[float, float]:
        # Beyond the edge y shrinks: t = x / y from its value at the edge to infinity.
        y2 = e2 * mean.of(mean.slope / (t - mean.slope))
        y = math.sqrt(y2)
        G = mean.slope / (t - mean.slope) / y
        left = (1 - e2 * mean.of(G * z * h) / v) ** 2 * v
        right = e2**2 * mean.of(G * z * z) * (mean.of(G * h * h) / v - y / e2)
        return left - right, t * y

    start = bulk / y_edge
    if determinant(start * (1 + 1e-9))[0] >= 0:
        return 0.0
    log_t = _bisect(
        lambda log_t: determinant(start * (1 + math.exp(log_t)))[0], math.log(1e-9), 25.0
    )
    return determinant(start * (1 + math.exp(log_t)))[1]


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Where the function turns from negative to positive."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2
