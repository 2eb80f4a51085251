"""Dense weights, and the base of those that are parametrised to keep a structure."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def whole(t: Tensor) -> Tensor:
    """A parameter, gathered where it is distributed (a ``DTensor``), as the solve needs all of W;
    its gradient is distributed again."""
    if type(t) is nn.Parameter or type(t) is Tensor or not hasattr(t, "full_tensor"):
        return t
    gathered: Tensor = t.full_tensor()
    return gathered


class Dense(nn.Module):
    """Independent normal entries of variance ``scale^2 / d``.

    Args:
        features: d.
        scale: spectral radius of W at the start, in the limit of large d.
        device: of the parameters.
        dtype: of the parameters.
    """

    tags: frozenset[str] = frozenset()

    def __init__(
        self,
        features: int,
        scale: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.features = features
        self.scale = float(scale)
        self.weight = nn.Parameter(torch.empty(features, features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(std=self.scale / math.sqrt(self.features))

    def norm_bound(self) -> float | None:
        return None

    def forward(self) -> Tensor:
        return whole(self.weight)

    def extra_repr(self) -> str:
        return f"features={self.features}, scale={self.scale}"


class Structured(Dense):
    """A weight that is parametrised, hence keeps its structure through training, or is only
    initialised with it."""

    structure: frozenset[str]  # the tags of a parametrised one

    def __init__(
        self,
        features: int,
        scale: float,
        *,
        parametrized: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.parametrized = parametrized
        super().__init__(features, scale, device=device, dtype=dtype)

    @property
    def tags(self) -> frozenset[str]:  # type: ignore[override]
        return self.structure if self.parametrized else Dense.tags

    def compose(self, raw: Tensor) -> Tensor:
        """W from the unconstrained ``raw`` ``(d, d)``."""
        raise TypeError(f"{type(self).__name__} does not define compose")

    def forward(self) -> Tensor:
        weight = whole(self.weight)
        return self.compose(weight) if self.parametrized else weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, parametrized={self.parametrized}"
