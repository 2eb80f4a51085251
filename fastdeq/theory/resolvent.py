"""Where the eigenvalues of W lie, and the largest singular values of W and of ``(I - W)^-1``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .conventions import check_count, check_linear, check_size, check_weight, number_of


def eigenvalue_density(weight: str, scale: float, at: Tensor) -> Tensor:
    """The density of the eigenvalues of W in the limit of large d; it integrates to 1.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        scale: spectral radius s of W, positive.
        at: where. Dense: points of the complex plane (a complex tensor, or a real one for points
            on the real axis). Symmetric: real points. Orthogonal: angles t of ``s e^(i t)``.

    Returns:
        A real tensor of the shape of ``at``. Dense: ``1 / (pi s^2)`` per area within the disc of
        radius s (Ginibre 1965; Girko 1985). Symmetric: ``2 sqrt(s^2 - x^2) / (pi s^2)`` per length
        on [-s, s] (Wigner 1958). Orthogonal: ``1 / (2 pi)`` per radian (Diaconis and Shahshahani
        1994).

    Raises:
        ValueError: unknown family; a scale that is not positive and finite.
        TypeError: ``at`` that is no tensor; complex points for a family whose density is not one
            of the plane.
    """
    check_weight(weight)
    s = _positive(scale)
    if not isinstance(at, Tensor):
        raise TypeError(f"at must be a tensor of points, not {type(at).__name__}.")
    if at.is_complex() and weight != "dense":
        where = "real points" if weight == "symmetric" else "angles"
        raise TypeError(f"{weight} weights have their density at {where}: at must be real.")
    distance = at.abs().to(torch.get_default_dtype()) if not at.is_floating_point() else at.abs()
    if weight == "symmetric":
        return 2 * (s * s - distance * distance).clamp(min=0).sqrt() / (math.pi * s * s)
    if weight == "orthogonal":
        return torch.full_like(distance, 1 / (2 * math.pi))
    return (distance <= s) / (math.pi * s * s) * torch.ones_like(distance)


def eigenvalue_boundary(weight: str, scale: float, points: int = 200) -> Tensor:
    """The curve that bounds the eigenvalues of W in the complex plane, for a plot.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        scale: spectral radius s of W, positive.
        points: how many points of the curve, at least 2.

    Returns:
        A complex128 tensor ``(points,)``: the circle of radius s from s back to s, on which all
        eigenvalues of orthogonal weights lie and within which those of dense ones; for symmetric
        weights the segment from -s to s.

    Raises:
        ValueError: unknown family; a scale that is not positive and finite; fewer than 2 points.
    """
    check_weight(weight)
    s = _positive(scale)
    points = check_count(points, "points", 2, 200)
    if weight == "symmetric":
        return torch.linspace(-s, s, points, dtype=torch.float64).to(torch.complex128)
    angle = torch.linspace(0, 2 * math.pi, points, dtype=torch.float64)
    return torch.polar(torch.full_like(angle, s), angle)


def weight_norm(weight: str, scale: float) -> float:
    """The 2-norm of W in the limit of large d.

    Below 1 it makes plain iteration with any nonexpansive activation converge.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        scale: spectral radius s of W, finite and not negative.

    Returns:
        orthogonal and symmetric s; dense ``2 s`` (Geman, Ann. Probab. 8 (1980) 252).

    Raises:
        ValueError: unknown family; a scale that is negative or not finite.
    """
    check_weight(weight)
    return check_size(scale, "scale") * (2 if weight == "dense" else 1)


def resolvent_norm(weight: str, scale: float) -> float:
    """The 2-norm of ``(I - W)^-1`` in the limit of large d.

    It bounds how much the worst direction of an injection, or of a gradient, is amplified, and how
    far an equilibrium is from a state of a given residual.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        scale: spectral radius s of W, ``|s| < 1``; the sign does not matter.

    Returns:
        orthogonal and symmetric ``1 / (1 - s)``; dense ``x^(-1/2)``, where, with
        ``t = sqrt(1 + 8 / s^2)``, the left edge x of the squared singular values of ``I - W`` is
        ``s^2 (t - 3)^3 / (8 (t - 1))``. It grows like ``sqrt(27 / 4) (1 - s^2)^(-3/2)`` as s -> 1.

    Raises:
        ValueError: unknown family; ``|s| >= 1`` or NaN, where there is no finite limit.

    Source of the dense edge: by :func:`variance`, the Stieltjes transform m at w has
    ``w = 1/u^2 - s^2 / (u (u - 1))`` with ``u = 1 + s^2 m``. To the left of the spectrum m grows
    with w, until ``dw/du = 0``: ``2 (1 - s^2) u^2 - (4 - s^2) u + 2 = 0`` (Dozier and Silverstein,
    J. Multivariate Anal. 98 (2007) 1099: the support ends where w(u) does not grow). The larger
    root, ``u = (4 - s^2 + s sqrt(8 + s^2)) / (4 (1 - s^2))``, gives x = w(u), which simplifies as
    above.
    """
    s2 = check_linear(weight, scale)
    if weight != "dense":
        return 1 / (1 - math.sqrt(s2))
    if s2 == 0:
        return 1.0
    t = math.sqrt(1 + 8 / s2)
    # t - 3 without cancellation as s -> 1.
    gap = 8 * (1 - s2) / (s2 * (t + 3))
    return math.sqrt(8 * (t - 1) / (s2 * gap**3))


def _positive(scale: float) -> float:
    number = number_of(scale, "scale")
    if not 0 < number < math.inf:
        raise ValueError(f"scale must be positive and finite, e.g. scale=0.9; got {scale!r}.")
    return number
