"""The scale of a weight in either convention, and checks of the numbers that predictions take."""

from __future__ import annotations

import math
import numbers

import torch

from ..conventions import RATIO
from ..errors import check_choice


def spectral_radius(weight: str, entry_scale: float) -> float:
    """The spectral radius of W whose entries have variance ``entry_scale^2 / d``.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        entry_scale: finite and not negative.

    Raises:
        ValueError: unknown family; an entry scale that is negative or not finite.
    """
    return RATIO[check_weight(weight)] * check_size(entry_scale, "entry_scale")


def entry_scale(weight: str, spectral_radius: float) -> float:
    """The scale e such that W of this spectral radius has entries of variance ``e^2 / d``.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        spectral_radius: finite and not negative.

    Raises:
        ValueError: unknown family; a spectral radius that is negative or not finite.
    """
    return check_size(spectral_radius, "spectral_radius") / RATIO[check_weight(weight)]


def check_weight(weight: str) -> str:
    check_choice(weight, RATIO, "weight")
    return weight


def number_of(value: float, name: str) -> float:
    """A number, also one of NumPy or a tensor of one element; TypeError for anything else."""
    single = isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()
    if not single and (not isinstance(value, numbers.Real) or isinstance(value, bool)):
        raise TypeError(f"{name} must be a real number, e.g. {name}=0.9; got {value!r}.")
    return float(value)


def check_size(value: float, name: str) -> float:
    number = number_of(value, name)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, e.g. {name}=0.9; got {value!r}.")
    return number


def check_linear(weight: str, scale: float) -> float:
    """``scale^2``, of a scale at which a linear DEQ has a limit."""
    check_weight(weight)
    square = number_of(scale, "scale") ** 2
    # Written so that NaN fails. A scale a rounding error below 1 may square to 1.
    if not square < 1:
        raise ValueError(
            f"scale={scale!r}: the linear DEQ has a finite limit only for |scale| < 1, where the "
            "spectral radius of W stays below 1."
        )
    return square


def check_features(features: int) -> int:
    return check_count(features, "features", 1, 256)


def check_count(value: int, name: str, least: int, example: int) -> int:
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integral or value < least:
        raise ValueError(
            f"{name} must be an integer >= {least}, e.g. {name}={example}; got {value!r}."
        )
    return int(value)
