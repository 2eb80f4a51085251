"""Moments of the linear DEQ ``z = W z + c`` and of its adjoint, in the limit of large d.

``z* = R c`` with ``R = (I - W)^-1``. For c that does not depend on W, and W of a family whose law
does not change under ``W -> O W O^T`` (all three named families), c may be taken as a uniform
direction, so quadratic forms of c become normalised traces:

    c.z*   / |c|^2  ->  m_0 = lim (1/d) tr R
    |z*|^2 / |c|^2  ->  m_1,      m_p = lim (1/d) tr (R R^T)^p.

m_p is the mean of the p-th power of the squared singular values of R: m_1 says how large the
equilibrium is, m_2 how unevenly R treats directions.

The adjoint ``u = g + W^T u`` is ``R^T g``, and R^T has the singular values of R: for g that does
not depend on W, ``|u|^2 / |g|^2 -> m_1``, and ``dL/dW = u z*^T`` has
``|dL/dW|^2 / (|g|^2 |c|^2) -> m_1^2``. A loss of the length of the state, ``L = |z*|^2 / 2``, has
``g = z*``, and ``u = R^T R c``: then ``|u|^2 / |c|^2 -> m_2`` and
``|dL/dW|^2 / |c|^4 -> m_1 m_2``. This is how a gradient feels the fourth moment.

*Untied* weights, a fresh W_t in each step ``z <- W_t z + c``, forget this: see
:func:`untied_variance`.

``scale`` s is the spectral radius; ``theory.spectral_radius`` computes it from an entry scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..conventions import RATIO
from .conventions import check_linear, check_size, check_weight


def overlap(weight: str, scale: float) -> float:
    """``m_0 = c.z* / |c|^2`` of a linear DEQ of large width.

    Given c, z* is ``m_0 c`` and a part of length ``sqrt(m_1 - m_0^2) |c|`` in a uniform direction
    at right angles to c, as R commutes with no direction but c: so an entry of z* is ``m_0 c_i``
    plus normal noise.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        scale: spectral radius s of W, ``|s| < 1``; the sign does not matter.

    Returns:
        dense and orthogonal 1, as ``tr W^k`` vanishes for all ``k >= 1``; symmetric
        ``G(1) = 2 (1 - sqrt(1 - s^2)) / s^2`` (G: see :func:`variance`).

    Raises:
        ValueError: unknown family; ``|s| >= 1`` or NaN.
    """
    s2 = check_linear(weight, scale)
    return 2 / (1 + math.sqrt(1 - s2)) if weight == "symmetric" else 1.0


def variance(weight: str, scale: float) -> float:
    """``m_1 = |z*|^2 / |c|^2`` of a linear DEQ of large width, also ``|u|^2 / |g|^2``.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        scale: spectral radius s of W, ``|s| < 1``; the sign does not matter.

    Returns:
        dense and orthogonal ``1 / (1 - s^2)``; symmetric ``2 (1 / sqrt(1 - s^2) - 1) / s^2``,
        which is 1 at s = 0.

    Raises:
        ValueError: unknown family; ``|s| >= 1`` or NaN, where there is no finite limit.

    Source, per family:
        orthogonal: the eigenvalues are ``s e^(i t)`` with uniform t (Diaconis and Shahshahani, J.
        Appl. Probab. 31A (1994) 49); the mean of ``1 / |1 - s e^(i t)|^2`` is that of the Poisson
        kernel.
        dense: ``I - W`` is a signal matrix I plus noise of variance s^2/d, so
        ``m(w) = lim (1/d) tr[((I - W)(I - W)^T - w)^-1]`` solves ``m (1/u - w u) = 1`` with
        ``u = 1 + s^2 m`` (Dozier and Silverstein, J. Multivariate Anal. 98 (2007) 678). At w = 0,
        m = u.
        symmetric: the semicircle on [-s, s] (Wigner 1958) has the Stieltjes transform
        ``G(x) = 2 (x - sqrt(x^2 - s^2)) / s^2``, and ``m_1 = -G'(1)``.
    """
    return _VARIANCE[check_weight(weight)](check_linear(weight, scale))


def fourth_moment(weight: str, scale: float) -> float:
    """``m_2 = (1/d) tr[((I - W)(I - W)^T)^-2]`` of a linear DEQ of large width.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        scale: spectral radius s of W, ``|s| < 1``; the sign does not matter.

    Returns:
        dense ``1 / (1 - s^2)^4``; orthogonal ``(1 + s^2) / (1 - s^2)^3``; symmetric
        ``1 / (1 - s^2)^(5/2)``.

    Raises:
        ValueError: unknown family; ``|s| >= 1`` or NaN, where there is no finite limit.

    Source, with the notation of :func:`variance`:
        orthogonal: ``1 / (1 - s e^(i t))^2 = sum_k (k + 1) s^k e^(i k t)``, so by Parseval
        ``m_2 = sum_k (k + 1)^2 s^(2 k)``.
        dense: ``m_2 = m'(0)``. The derivative of ``m (1/u - w u) = 1`` at w = 0, where m = u, is
        ``m'/m = s^2 m'/m + m^2``, so ``m' = m^3 / (1 - s^2)``.
        symmetric: ``m_2 = -G'''(1) / 6``.
    """
    return _FOURTH_MOMENT[check_weight(weight)](check_linear(weight, scale))


def weight_gradient_moment(weight: str, scale: float, *, of_length: bool = False) -> float:
    """``|dL/dW|^2`` of a linear DEQ of large width, where ``dL/dW = u z*^T``.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        scale: spectral radius s of W, ``|s| < 1``; the sign does not matter.
        of_length: False: for ``g = dL/dz*`` that does not depend on W. True: for the loss
            ``L = |z*|^2 / 2``.

    Returns:
        ``m_1^2``, in units of ``|g|^2 |c|^2``; with ``of_length``, ``m_1 m_2``, in units of
        ``|c|^4``. (For a parametrised weight this is the gradient with respect to the matrix W.)

    Raises:
        ValueError: unknown family; ``|s| >= 1`` or NaN, where there is no finite limit.
    """
    m1 = variance(weight, scale)
    return m1 * (fourth_moment(weight, scale) if of_length else m1)


def untied_variance(weight: str, scale: float) -> float:
    """``|z|^2 / |c|^2`` in the limit of many steps ``z <- W_t z + c`` with a fresh W_t in each.

    ``W_t z`` has the length ``e |z|`` (e the entry scale) and no overlap with c, whatever the
    family: ``v = e^2 v + 1``. Tied dense and orthogonal weights have the same :func:`variance`,
    tied symmetric ones a larger one: ``tr W^2`` does not vanish, so a tied W returns to c.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        scale: spectral radius s of each W_t; its entry scale must be below 1, so ``s < 1``, and
            ``s < 2`` for symmetric weights.

    Returns:
        ``1 / (1 - e^2)``.

    Raises:
        ValueError: unknown family; a negative scale, or one without a finite limit.
    """
    return 1 / (1 - _entry_variance(weight, scale))


def untied_fourth_moment(weight: str, scale: float) -> float:
    """``lim (1/d) tr (R R^T)^2`` of the map R from c to z that untied steps converge to.

    In law ``R = I + W R'``, where W and R' are free (Voiculescu) and R' is distributed as R. With
    ``B = W R'``, P = R' R'^T and S = W^T W, traces of an odd number of W vanish, so

        ``m_2 = 1 + 4 tr B B^T + 2 tr B^2 + tr P S P S``

    with tr normalised; ``tr B B^T = e^2 m_1``, ``tr B^2 = e^2`` for symmetric W and else 0, and
    ``tr P S P S = m_2 tr(S)^2 + m_1^2 (tr S^2 - tr(S)^2)`` for free P and S (Nica and Speicher,
    Lectures on the Combinatorics of Free Probability, 2006), where ``tr S = e^2`` and ``tr S^2`` is
    e^4 for orthogonal and 2 e^4 for other weights. Here tied and untied differ for all families.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        scale: as in :func:`untied_variance`.

    Raises:
        ValueError: unknown family; a negative scale, or one without a finite limit.
    """
    e2 = _entry_variance(weight, scale)
    m1 = 1 / (1 - e2)
    spread = 0.0 if weight == "orthogonal" else (e2 * m1) ** 2
    returns = 2 * e2 if weight == "symmetric" else 0.0
    return (1 + 4 * e2 * m1 + returns + spread) / (1 - e2 * e2)


def _symmetric_variance(s2: float) -> float:
    # 2 (1/q - 1) / s^2 with s^2 = (1 - q)(1 + q): no cancellation for small s.
    q = math.sqrt(1 - s2)
    return 2 / (q * (1 + q))


# Functions of s^2.
_Formulas = dict[str, Callable[[float], float]]
_VARIANCE: _Formulas = {
    "dense": lambda s2: 1 / (1 - s2),
    "orthogonal": lambda s2: 1 / (1 - s2),
    "symmetric": _symmetric_variance,
}
_FOURTH_MOMENT: _Formulas = {
    "dense": lambda s2: (1 - s2) ** -4,
    "orthogonal": lambda s2: (1 + s2) / (1 - s2) ** 3,
    "symmetric": lambda s2: (1 - s2) ** -2.5,
}


def _entry_variance(weight: str, scale: float) -> float:
    e = check_size(scale, "scale") / RATIO[check_weight(weight)]
    if not e * e < 1:
        raise ValueError(
            f"scale={scale!r}: untied steps of {weight} weights converge only for "
            f"scale < {RATIO[weight]:g}, where the entries have a variance below 1/d."
        )
    return e * e
