"""Which prediction of ``fastdeq.theory`` stands beside a measured quantity of the initial weights.

``PREDICTORS`` holds, per activation, a function of (quantity, weight, scale, injection variance)
that returns the limit for large d, or None where the theory has none.
"""

from __future__ import annotations

from collections.abc import Callable

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


def mean_field(activation: str) -> Predictor:
    """A nonlinear cell by mean field, up to the edge of stability."""

    def predictor(quantity: str, weight: str, scale: float, injection: float) -> float | None:
        try:
            found = theory.equilibrium(weight, activation, scale, injection)
        except ValueError:  # no finite length
            return None
        values = {
            "length": found.length / injection,
            "adjoint": found.adjoint_variance,
            "moment_1": found.adjoint_variance,
            "mean_square_slope": found.mean_square_slope,
            "radius": found.jacobian_radius,
        }
        return values.get(quantity) if found.stable else None

    return predictor


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
