"""Which prediction of ``fastdeq.theory`` stands beside a measured quantity of the initial weights.

``PREDICTORS`` holds, per activation, a function of (quantity, weight, scale, injection variance)
that returns the limit for large d, or None where the theory has none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .. import theory

Predictor = Callable[[str, str, float, float], float | None]

_MOMENTS = {
    "length": theory.variance,
    "adjoint": theory.variance,
    "moment_1": theory.variance,
    "moment_2": theory.fourth_moment,
}


def linear(quantity: str, weight: str, scale: float, injection: float) -> float | None:
    """The linear DEQ, which has a finite limit for scales below 1."""
    if quantity == "radius":
        return scale
    if quantity == "mean_square_slope":
        return 1.0
    if quantity not in _MOMENTS or not scale < 1:
        return None
    return _MOMENTS[quantity](weight, scale)


def mean_field(activation: str, equilibrium: Callable[..., Any]) -> Predictor:
    """Mean field of a nonlinear DEQ, where its equilibrium is stable.

    Args:
        activation: a name.
        equilibrium: a function of (weight, activation, scale, injection variance); its result has
            ``length``, ``mean_square_slope``, ``adjoint_variance``, ``jacobian_radius`` and
            ``stable``.
    """
    solve = functools.lru_cache(maxsize=None)(equilibrium)

    def predict(quantity: str, weight: str, scale: float, injection: float) -> float | None:
        try:
            found = solve(weight, activation, scale, injection)
        except ValueError:  # no finite length
            return None
        if not found.stable:
            return None
        # The first moment, (1/d) tr[((I - J)(I - J)^T)^-1], is the mean of |u|^2 / |g|^2 over g.
        return {
            "length": found.length / injection,
            "adjoint": found.adjoint_variance,
            "moment_1": found.adjoint_variance,
            "mean_square_slope": found.mean_square_slope,
            "radius": found.jacobian_radius,
        }.get(quantity)

    return predict


PREDICTORS: dict[str, Predictor] = {"identity": linear}
_equilibrium = getattr(theory, "equilibrium", None)
if _equilibrium is not None:
    PREDICTORS |= {a: mean_field(a, _equilibrium) for a in ("tanh", "relu", "hardtanh")}


def predict(
    quantity: str, weight: str, scale: float, activation: str, injection: float
) -> float | None:
    """The prediction, or None where there is none."""
    predictor = PREDICTORS.get(activation)
    return None if predictor is None else predictor(quantity, weight, scale, injection)
