"""Random-matrix predictions for the linear DEQ ``z = W z + c``, in the limit of large d.

With ``phi`` the identity, ``z* = (I - W)^-1 c``. For a c that does not depend on W, and W of a
family that is invariant under rotations (all three named families are),

    variance        |z*|^2 / |c|^2  ->  m_1,     fourth moment  m_2,
    m_p = lim (1/d) tr[((I - W)(I - W)^T)^-p].

m_p is the mean of the p-th power of the squared singular values of ``(I - W)^-1``: m_1 says how
large the equilibrium is, m_2 how unevenly it treats directions, and by the same matrix how uneven
the gradient is. Dense and orthogonal weights of one scale share m_1 and differ in m_2: this is the
sense in which a DEQ feels higher-order statistics of its weights (Agarwala and Schoenholz, ICML
2022). As s -> 1, with e = 1 - s, they grow like

    family        m_1               m_2
    dense         (2 e)^-1          (2 e)^-4
    orthogonal    (2 e)^-1          2 (2 e)^-3
    symmetric     2 (2 e)^-1/2      (2 e)^-5/2

``scale`` s is fastdeq's, the spectral radius: symmetric entries have variance ``s^2 / (4 d)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .errors import check_choice


def variance(weight: str, scale: float) -> float:
    """``m_1 = |z*|^2 / |c|^2`` of a linear DEQ of large width.

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
    return _evaluate(_VARIANCE, weight, scale)


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
    return _evaluate(_FOURTH_MOMENT, weight, scale)


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


def _evaluate(formulas: _Formulas, weight: str, scale: float) -> float:
    check_choice(weight, formulas, "weight")
    s2 = float(scale) ** 2
    # Written so that NaN fails. A scale a rounding error below 1 may square to 1.
    if not s2 < 1:
        raise ValueError(
            f"scale={scale!r}: the linear DEQ has a finite limit only for |scale| < 1, where the "
            "spectral radius of W stays below 1."
        )
    return formulas[weight](s2)
