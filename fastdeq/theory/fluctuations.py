"""How much the linear equilibrium differs between draws of W of a given width."""

from __future__ import annotations

import math

from .conventions import check_features, check_linear
from .linear import fourth_moment, variance


def variation(weight: str, scale: float, features: int) -> float:
    """The coefficient of variation of ``|z*|^2`` over draws of W, for a fixed c.

    ``|z*|^2 = c^T R^T R c`` with ``R = (I - W)^-1``. As the law of W does not change under
    rotations, c may be taken as uniform on a sphere, independent of the spectrum of R R^T. Given
    the spectrum, the mean of ``|z*|^2 / |c|^2`` is its m_1, and the variance
    ``2 (m_2 - m_1^2) / (d + 2)``: entries v_i of a unit vector have ``E v_i^4 = 3 / (d (d + 2))``
    and ``E v_i^2 v_j^2 = 1 / (d (d + 2))``. To it comes the variance of m_1 itself, see
    :func:`trace_variation`. Left out: terms smaller by 1/d.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        scale: spectral radius s of W, ``|s| < 1``; the sign does not matter.
        features: d.

    Returns:
        Standard deviation over mean, to leading order in 1/d. It is that of typical draws: for
        dense and symmetric weights of finite d, I - W comes close enough to a singular matrix,
        with a tiny probability, to give ``|z*|^2`` an infinite mean. Where :func:`effective_width`
        is not large, such draws are not rare, and no coefficient of variation describes them.

    Raises:
        ValueError: unknown family; ``|s| >= 1`` or NaN; d that is not a positive integer.
    """
    m1, m2 = variance(weight, scale), fourth_moment(weight, scale)
    direction = 2 * (m2 / m1**2 - 1) / (check_features(features) + 2)
    return math.sqrt(direction + trace_variation(weight, scale, features) ** 2)


def trace_variation(weight: str, scale: float, features: int) -> float:
    """The coefficient of variation of ``(1/d) tr R R^T`` over draws of W, ``R = (I - W)^-1``.

    It is of order 1/d: eigenvalues repel each other.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        scale: spectral radius s of W, ``|s| < 1``; the sign does not matter.
        features: d.

    Returns:
        With ``q = sqrt(1 - s^2)``, ``r = (1 - q) / s`` and m_1 of :func:`variance`:
        orthogonal ``2 s / (q^2 d)``; dense ``s sqrt(4 + 2 s^2) / (q^4 d)``; symmetric
        ``sqrt(2 sum_k k r^(2 k) (1 + k q)^2) / (q^3 m_1 d)``.

    Raises:
        ValueError: unknown family; ``|s| >= 1`` or NaN; d that is not a positive integer.

    Source, per family:
        orthogonal: ``|1 - s e^(i t)|^-2 = (1 + 2 sum_k s^k cos(k t)) / q^2``, and the traces of
        Q^k are independent with variance k (Diaconis and Shahshahani 1994; exact for ``2 k <= d``).
        symmetric: for entries as of the GOE the trace of ``f(W)``, with
        ``f(s cos t) = a_0 / 2 + sum_k a_k cos(k t)``, has the variance ``sum_k k a_k^2 / 2``
        (Johansson, Duke Math. J. 91 (1998) 151). For ``f(x) = (1 - x)^-2``, minus the derivative of
        ``1 / (a - s cos t) = (1 + 2 sum_k r^k cos(k t)) / q`` with respect to a at a = 1,
        ``a_k = 2 r^k (1 + k q) / q^3``.
        dense: the resolvent of the Hermitised ``X - z``, X of entry variance 1/d and z = 1/s, at
        two points i h on the imaginary axis has a covariance proportional to
        ``d/dh1 d/dh2 log[(1 - u1 u2 z^2)^2 - (m1 m2)^2]`` (Cipolloni, Erdos and Schroder, Electron.
        J. Probab. 26 (2021), for real entries). With ``a = s^2 / (1 - s^2)``, m = i h a + ... and
        ``u = s^2 - a^2 h^2 + ...``; the coefficient of h1^2 h2^2 is
        ``-a^4 (2 z^2 / q^2 + 3 / q^4)``. The factor was set, and the result confirmed, by the
        terms in W: ``tr R R^T = d + 2 tr W + (2 tr W^2 + tr W W^T) + ...`` has the variance
        ``4 s^2 + 26 s^4 + O(s^6)``.
    """
    s2 = check_linear(weight, scale)
    d = check_features(features)
    q = math.sqrt(1 - s2)
    if weight == "orthogonal":
        return 2 * math.sqrt(s2) / (q**2 * d)
    if weight == "dense":
        return math.sqrt(s2 * (4 + 2 * s2)) / (q**4 * d)
    x = s2 / (1 + q) ** 2  # r^2, without cancellation
    first = x / (1 - x) ** 2  # sum k x^k, and so on
    second = x * (1 + x) / (1 - x) ** 3
    third = x * (1 + 4 * x + x * x) / (1 - x) ** 4
    total = first + 2 * q * second + q * q * third
    return math.sqrt(2 * total) / (q**3 * variance(weight, scale) * d)


def effective_width(weight: str, scale: float, features: int) -> float:
    """A number that must be large for predictions of large width to hold at this width.

    The limit assumes that the gap between 1 and the spectrum is wide compared with how far the
    outermost eigenvalues, or singular values, stray from it at width d:

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        scale: spectral radius s of W, ``|s| < 1``; the sign does not matter.
        features: d.

    Returns:
        dense ``d (1 - s^2)^2``: the smallest squared singular value of I - W lies near
        ``(4/27) (1 - s^2)^3`` (:func:`resolvent_norm`), while at s = 1 it is of order
        ``d^(-3/2)``. Eigenvalues of W likewise leave the disc by ``s sqrt(log(d) / (4 d))`` (Rider,
        J. Phys. A 36 (2003) 3401).
        symmetric ``d (1 - s^2)^(3/2)``: the largest eigenvalue fluctuates by ``d^(-2/3)`` (Tracy
        and Widom 1996).
        orthogonal ``d (1 - s^2)``: angles are ``2 pi / d`` apart, and the resolvent's width is
        ``1 - s``; its norm is at most ``1 / (1 - s)`` at any width.

    Raises:
        ValueError: unknown family; ``|s| >= 1`` or NaN; d that is not a positive integer.
    """
    gap = 1 - check_linear(weight, scale)
    power = {"dense": 2.0, "symmetric": 1.5, "orthogonal": 1.0}[weight]
    return check_features(features) * float(gap**power)
