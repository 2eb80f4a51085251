"""Means over a normal variable, or over the pre-activation that it sets, to about ten digits.

Gauss-Legendre panels rather than Gauss-Hermite nodes: activations have kinks at 0 and at 1, where
panels end, and turn over a distance of 1 whatever the variance, where panels are narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

#: Standard deviations beyond which the normal density, below 1e-31, is left out.
_REACH = 12.0
_NODES, _PANELS = 16, 24
# Ends of panels on either side of 0, besides those that the variance sets.
_FEATURES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
#: The least variance that is told from zero: activations are scale-free at 0, so slopes are those
#: of the limit.
_LEAST_VARIANCE = 1e-24


@lru_cache(maxsize=1)
def legendre() -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature on [-1, 1].

    Eigenvalues of the Jacobi matrix of the Legendre polynomials, and twice the squares of the first
    entries of its eigenvectors (Golub and Welsch, Math. Comp. 23 (1969) 221).
    """
    k = torch.arange(1, _NODES, dtype=torch.float64)
    off_diagonal = k / (4 * k * k - 1).sqrt()
    jacobi = torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    nodes, vectors = torch.linalg.eigh(jacobi)
    return nodes, 2 * vectors[0].square()


def rule(
    variance: float,
    reaction: float,
    function: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Nodes p and weights, so that ``(weights * f(p)).sum()`` is the mean of f(p).

    p solves ``p - reaction * function(p) = h`` with normal h of mean 0 and this variance. Where the
    left side grows, the density of p is that of h times ``1 - reaction * slope(p)``.

    Raises:
        ValueError: p is not a function of h, as the left side does not grow everywhere.
    """
    deviation = math.sqrt(max(variance, _LEAST_VARIANCE))
    if reaction == 0:
        low, high = -_REACH * deviation, _REACH * deviation
    else:
        # 12 deviations of h, rounded up to the next power of 1.1.
        sizes = deviation * _REACH * 1.1 ** torch.arange(80, dtype=torch.float64)
        ends = []
        for p in (-sizes, sizes):
            field = (p - reaction * function(p)).abs()
            beyond = (field >= _REACH * deviation).nonzero()
            if len(beyond) == 0:
                raise ValueError(_TOO_STRONG)
            ends.append(float(p[beyond[0]]))
        low, high = ends
    features = [sign * f for f in _FEATURES for sign in (-1, 1) if low < sign * f < high]
    edges = torch.cat(
        [
            torch.linspace(low, 0, _PANELS + 1, dtype=torch.float64),
            torch.linspace(0, high, _PANELS + 1, dtype=torch.float64),
            torch.tensor(features, dtype=torch.float64),
        ]
    ).unique()
    half = edges.diff()[:, None] / 2
    nodes, weights = legendre()
    p = (edges[:-1, None] + half * (1 + nodes)).flatten()
    weights = (half * weights).flatten()
    field = p
    if reaction != 0:
        jacobian = 1 - reaction * slope(p)
        if not bool((jacobian > 0).all()):
            raise ValueError(_TOO_STRONG)
        field, weights = p - reaction * function(p), weights * jacobian
    density = torch.exp(-0.5 * (field / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
    return p, weights * density


_TOO_STRONG = (
    "the reaction of symmetric weights is so strong that a unit has several states in one field: "
    "there is no single equilibrium to predict. Take a smaller scale."
)
