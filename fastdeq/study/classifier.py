"""A classifier with one DEQ layer and a linear head. No numerics of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..activations import ActivationName
from ..cells import AffineCell
from ..errors import check_choice
from ..layer import DEQLayer
from ..weights import WEIGHTS, Dense


def recurrent_weight(weight: str, features: int, scale: float, parametrized: bool) -> Dense:
    """A weight of a family, which keeps its structure in training or only starts with it.

    Raises:
        ValueError: an unknown family.
    """
    check_choice(weight, WEIGHTS, "weight")
    free = {} if parametrized or weight == "dense" else {"parametrized": False}
    return WEIGHTS[weight](features, scale, **free)


class DEQClassifier(nn.Module):
    """``logits = V z* + a`` with ``z* = phi(W z* + U x + b)``.

    Args:
        in_features, features, classes: sizes of x, of the state z and of the output.
        weight: "dense", "orthogonal" or "symmetric".
        scale: spectral radius of W at initialisation, in the limit of large ``features``.
        parametrized: whether W keeps its structure in training (:class:`fastdeq.Orthogonal`).
        activation: phi, a name from ``fastdeq.ACTIVATIONS``.
        options: of :class:`fastdeq.DEQLayer`, e.g. ``tol``, ``max_iter``, ``on_failure``.

    Raises:
        ValueError, TypeError: as :class:`fastdeq.AffineCell` and :class:`fastdeq.DEQLayer` do.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        classes: int,
        *,
        weight: str,
        scale: float,
        parametrized: bool = True,
        activation: ActivationName = "tanh",
        **options: Any,
    ):
        super().__init__()
        recurrent = recurrent_weight(weight, features, scale, parametrized)
        cell = AffineCell(in_features, features, activation=activation, weight=recurrent)
        self.layer = DEQLayer(cell, **options)
        self.head = nn.Linear(features, classes)

    def recurrent_weights(self) -> list[Dense]:
        """The weights that belong to the family."""
        return [self.layer.cell.weight]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, classes)`` for x ``(B, in_features)``."""
        return self.head(self.layer(x))
