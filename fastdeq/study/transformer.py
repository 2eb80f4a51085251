"""A small character-level DEQ transformer, all of whose square weights start in one family."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from ..layer import DEQLayer
from ..weights import Dense
from .classifier import recurrent_weight

_HEADS = 4


def check_width(width: int) -> None:
    """Raises ValueError for a width that the heads cannot share."""
    if width % _HEADS:
        raise ValueError(f"width must be a multiple of {_HEADS}, the heads, got {width}.")


class SquareLinear(nn.Module):
    """``W h + b`` with a weight of a family; h ``(..., width)``."""

    def __init__(self, weight: Dense):
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(weight.features))

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight(), self.bias)


class Block(nn.Module):
    """One causal block of attention and a two-layer perceptron: z, x ``(B, T, width)``.

    Norms behind the sums keep the size of the state; the six square maps decide how strongly it
    depends on itself.
    """

    def __init__(
        self, width: int, *, weight: str, scale: float, parametrized: bool, activation: str
    ):
        super().__init__()
        self.phi = ACTIVATIONS[activation].function
        self.query, self.key, self.value, self.merge, self.up, self.down = (
            SquareLinear(recurrent_weight(weight, width, scale, parametrized)) for _ in range(6)
        )
        self.after_attention, self.after_mlp = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        batch, length, width = z.shape
        q, k, v = (
            part(z).view(batch, length, _HEADS, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        h = self.after_attention(x + self.merge(mixed.reshape(batch, length, width)))
        return self.after_mlp(x + h + self.down(self.phi(self.up(h))))


class CharacterTransformer(nn.Module):
    """Logits of the next character ``(B, T, classes)`` for codes ``(B, T)``.

    A sequence is a sample of the DEQ layer: its positions see each other and are solved together.

    Args:
        classes: number of characters.
        width: of the state of a character, a multiple of 4.
        context: T, the length of a sequence.
        weight: "dense", "orthogonal" or "symmetric", of the six square maps of the block.
        scale: their spectral radius at initialisation, in the limit of large ``width``.
        parametrized: whether they keep their structure in training.
        activation: of the perceptron, a name from ``fastdeq.ACTIVATIONS``.
        options: of :class:`fastdeq.DEQLayer`.

    Raises:
        ValueError: a width that is no multiple of 4; names and options as elsewhere.
    """

    def __init__(
        self,
        classes: int,
        width: int,
        context: int,
        *,
        weight: str,
        scale: float,
        parametrized: bool = False,
        activation: str = "gelu",
        **options: Any,
    ):
        super().__init__()
        check_width(width)
        self.embedding = nn.Embedding(classes, width)
        self.position = nn.Parameter(0.1 * torch.randn(context, width))
        self.recent = nn.Conv1d(width, width, 4)
        block = Block(
            width, weight=weight, scale=scale, parametrized=parametrized, activation=activation
        )
        self.layer = DEQLayer(block, **options)
        self.head = nn.Linear(width, classes)

    def recurrent_weights(self) -> list[Dense]:
        """The weights that belong to the family."""
        return [m.weight for m in self.layer.cell.children() if isinstance(m, SquareLinear)]

    def forward(self, codes: Tensor) -> Tensor:
        e = self.embedding(codes)
        # The characters just before each one, outside of the solve.
        recent = self.recent(F.pad(e.transpose(1, 2), (3, 0))).transpose(1, 2)
        return self.head(self.layer(e + recent + self.position[: codes.shape[1]]))
