"""Recurrent weights: initialisation, parametrisation, tags and norm bounds of the three families.

A weight is a module whose ``forward()`` returns W ``(d, d)``. It may state what it knows of W, and
solvers follow it: ``tags`` (a frozenset of "orthogonal", "symmetric") and ``norm_bound()`` (a bound
on the 2-norm of W that holds at any time in training, or None). Any module of this shape serves as
``AffineCell(weight=...)``.

Scale: the spectral radius in the limit of large d. Circular law for dense entries of variance
s^2/d (Girko 1985), semicircle on [-s, s] for symmetric ones of variance s^2/(4d) (Wigner 1958).
The families and their comparison: Agarwala and Schoenholz, ICML 2022.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from .choices import check_choice


class Dense(nn.Module):
    """Independent normal entries of variance ``scale^2 / d``."""

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
        return self.weight

    def extra_repr(self) -> str:
        return f"features={self.features}, scale={self.scale}"


class _Structured(Dense):
    """A weight that is parametrised, hence keeps its structure through training, or is only
    initialised with it."""

    structure: str

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
        self.tags = frozenset({self.structure}) if parametrized else frozenset()

    def compose(self, raw: Tensor) -> Tensor:
        """W from the unconstrained ``raw`` ``(d, d)``."""
        raise TypeError(f"{type(self).__name__} does not define compose")

    def forward(self) -> Tensor:
        return self.compose(self.weight) if self.parametrized else self.weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, parametrized={self.parametrized}"


def orthogonal_factor(raw: Tensor) -> Tensor:
    """Q of ``raw = Q R`` with a positive diagonal of R: unique and differentiable for regular raw.

    Haar distributed where raw has independent normal entries (Mezzadri, Notices AMS 54 (2007) 592).
    Runs in float32 for narrower dtypes, which have no QR.
    """
    wide = raw if raw.dtype == torch.float64 else raw.float()
    with torch.autocast(raw.device.type, enabled=False):
        q, r = torch.linalg.qr(wide)
        sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
        factor: Tensor = (q * sign).to(raw.dtype)
        return factor


class Orthogonal(_Structured):
    """``W = scale * Q``, Q orthogonal and Haar distributed at initialisation.

    ``parametrized=True`` trains an unconstrained matrix whose QR factor is Q, so W stays orthogonal
    and its norm stays ``scale``; ``parametrized=False`` trains W itself from an orthogonal start.
    """

    structure = "orthogonal"
    stored_scale: Tensor

    def __init__(self, features: int, scale: float, **options: Any):
        super().__init__(features, scale, **options)
        if self.parametrized:  # W depends on the scale, so a state_dict carries it
            stored = torch.tensor(self.scale, device=self.weight.device, dtype=self.weight.dtype)
            self.register_buffer("stored_scale", stored)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_()
        if not self.parametrized:
            self.weight.copy_(self.compose(self.weight))

    def norm_bound(self) -> float | None:
        return abs(self.scale) if self.parametrized else None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A rounded copy of the own scale (a module in bfloat16) leaves the exact one in place.
        loaded = state_dict.get(f"{prefix}stored_scale")
        if loaded is not None and float(loaded) != float(self.stored_scale):
            self.scale = float(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def compose(self, raw: Tensor) -> Tensor:
        return self.scale * orthogonal_factor(raw)


class Symmetric(_Structured):
    """``W = W^T``, entries of variance ``scale^2 / (4 d)`` off the diagonal and twice that on it.

    ``parametrized=True`` trains A with ``W = (A + A^T) / 2``, exactly symmetric at all times;
    ``parametrized=False`` trains W itself from a symmetric start.
    """

    structure = "symmetric"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(std=self.scale / math.sqrt(2 * self.features))
        if not self.parametrized:
            self.weight.copy_(self.compose(self.weight))

    def compose(self, raw: Tensor) -> Tensor:
        return (raw + raw.t()) / 2


WEIGHTS: dict[str, type[Dense]] = {"dense": Dense, "orthogonal": Orthogonal, "symmetric": Symmetric}


def make_weight(
    weight: str | nn.Module,
    features: int,
    scale: float | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """A weight module from a family's name and a scale, or a weight object as it is.

    Raises:
        ValueError: unknown name; a scale that is missing, negative or not finite, or beside an
            object.
        TypeError: neither a name nor a module.
    """
    if isinstance(weight, nn.Module):
        if scale is not None:
            raise ValueError("scale belongs to the weight object: pass it there, not to the cell.")
        return weight
    if not isinstance(weight, str):
        raise TypeError(f"weight must be a name or a module that returns W, not {weight!r}.")
    check_choice(weight, WEIGHTS, "weight")
    if not isinstance(scale, numbers.Real) or not 0 <= scale < math.inf:
        raise ValueError(
            f"weight={weight!r} needs a finite scale >= 0, e.g. scale=0.9; got {scale!r}."
        )
    return WEIGHTS[weight](features, scale, device=device, dtype=dtype)
