"""Which prediction of ``fastdeq.theory`` stands beside a measured quantity of the initial weights.

``PREDICTORS`` holds, per activation, a function of (quantity, weight, scale, injection variance)
that returns the limit for large d, or None where the theory has none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from ... import theory

Predictor = Callable[[str, str, float, float], float | None]

_MOMENTS = {
    "length": theory.variance,
    "adjoint": theory.variance,
    "moment_1": theory.variance,
    "moment_2": theory.fourth_moment,
    "resolvent": theory.resolvent_norm,
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


_equilibrium = functools.lru_cache(maxsize=None)(theory.equilibrium)


def mean_field(activation: str) -> Predictor:
    """Mean field of a nonlinear DEQ, where its equilibrium is stable."""

    def predict(quantity: str, weight: str, scale: float, injection: float) -> float | None:
        try:
            found = _equilibrium(weight, activation, scale, injection)
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


PREDICTORS: dict[str, Predictor] = {
    "identity": linear,
    **{name: mean_field(name) for name in ("tanh", "relu", "hardtanh")},
}


def predict(
    quantity: str, weight: str, scale: float, activation: str, injection: float
) -> float | None:
    """The prediction, or None where there is none."""
    predictor = PREDICTORS.get(activation)
    return None if predictor is None else predictor(quantity, weight, scale, injection)
