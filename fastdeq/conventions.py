"""The two ways to state the scale of a weight: its spectral radius, or the size of its entries.

A family's spectral radius s and entry scale e (entries of variance ``e^2 / d``), in the limit of
large d:

    dense       s = e     circular law (Ginibre 1965; Girko 1985)
    orthogonal  s = e     W = s Q, and the squares of the entries of Q sum to d
    symmetric   s = 2 e   semicircle law (Wigner 1958)
"""

from __future__ import annotations

from typing import Literal, get_args

from .errors import check_choice

#: What a scale is: the spectral radius, or ``sqrt(d)`` times the deviation of an entry.
Convention = Literal["spectral_radius", "variance"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
#: Spectral radius over entry scale.
RATIO = {"dense": 1.0, "orthogonal": 1.0, "symmetric": 2.0}


def check_convention(convention: str) -> None:
    check_choice(convention, CONVENTIONS, "convention")


def radius_of(weight: str, scale: float, convention: str) -> float:
    """The spectral radius of a family's weights whose ``scale`` is stated in ``convention``."""
    return scale * RATIO[weight] if convention == "variance" else scale


def in_convention(weight: str, radius: float, convention: str) -> float:
    """A spectral radius as the number that states it in ``convention``; infinity stays."""
    return radius / RATIO[weight] if convention == "variance" else radius
