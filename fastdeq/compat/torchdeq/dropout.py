"""Dropout whose mask is the same in all evaluations of a solve, until it is reset."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class _Variational(nn.Module):
    """Dropout by a mask that is drawn at the first call in training mode and kept.

    Args:
        dropout: probability of a zero, in [0, 1].
    """

    mask: Tensor | None

    def __init__(self, dropout: float = 0.5):
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability from 0 to 1, got {dropout!r}.")
        self.dropout = dropout
        self.mask = None

    def shared_dims(self, x: Tensor) -> Iterable[int]:
        """Dimensions along which entries share one draw."""
        return ()

    def reset_mask(self, x: Tensor) -> None:
        """Draws a mask for inputs like x, on its device."""
        shared = {d % x.dim() for d in self.shared_dims(x)}
        shape = [1 if d in shared else n for d, n in enumerate(x.shape)]
        keep = 1 - self.dropout
        drawn = torch.zeros(shape, dtype=x.dtype, device=x.device).bernoulli_(keep)
        self.mask = drawn / keep if keep else drawn

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        if self.mask is None:
            self.reset_mask(x)
        mask = self.mask
        assert mask is not None
        if any(m not in (1, n) for m, n in zip(mask.shape, x.shape, strict=False)):
            raise ValueError(
                f"the mask of shape {tuple(mask.shape)} was drawn for another input than one of "
                f"shape {tuple(x.shape)}; call reset_dropout(model), or reset_deq(model), at the "
                "beginning of each training step."
            )
        return mask.to(x.device) * x

    def extra_repr(self) -> str:
        return f"dropout={self.dropout:g}"


class VariationalDropout(_Variational):
    """Dropout of single entries, for inputs of any shape."""


class _OfDimensions(_Variational):
    """Dropout of whole features or whole tokens.

    Args:
        dropout: probability of a zero, in [0, 1].
        token_first: inputs are ``(B, tokens, features)``; else ``(B, features, tokens)``.
    """

    dims: int
    drops_tokens: bool

    def __init__(self, dropout: float = 0.5, token_first: bool = True):
        super().__init__(dropout)
        self.token_first = token_first

    def shared_dims(self, x: Tensor) -> Iterable[int]:
        if x.dim() != self.dims + 2:
            raise ValueError(
                f"{type(self).__name__} takes inputs of {self.dims + 2} dimensions, got shape "
                f"{tuple(x.shape)}."
            )
        features = x.dim() - 1 if self.token_first else 1
        tokens = [d for d in range(1, x.dim()) if d != features]
        return [features] if self.drops_tokens else tokens


class VariationalDropout1d(_OfDimensions):
    """Dropout of features of ``(B, L, D)``, or ``(B, D, L)``."""

    dims, drops_tokens = 1, False


class VariationalDropout2d(_OfDimensions):
    """Dropout of features of ``(B, H, W, D)``, or ``(B, D, H, W)``."""

    dims, drops_tokens = 2, False


class VariationalDropout3d(_OfDimensions):
    """Dropout of features of ``(B, T, H, W, D)``, or ``(B, D, T, H, W)``."""

    dims, drops_tokens = 3, False


class VariationalDropToken1d(_OfDimensions):
    """Dropout of tokens of ``(B, L, D)``, or ``(B, D, L)``."""

    dims, drops_tokens = 1, True


class VariationalDropToken2d(_OfDimensions):
    """Dropout of tokens of ``(B, H, W, D)``, or ``(B, D, H, W)``."""

    dims, drops_tokens = 2, True


class VariationalDropToken3d(_OfDimensions):
    """Dropout of tokens of ``(B, T, H, W, D)``, or ``(B, D, T, H, W)``."""

    dims, drops_tokens = 3, True


def reset_dropout(model: nn.Module) -> None:
    """Forgets the masks of a model: the next call in training mode draws others."""
    for module in model.modules():
        if isinstance(module, _Variational):
            module.mask = None
