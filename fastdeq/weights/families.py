"""Recurrent weights: initialisation, parametrisation, tags and norm bounds of the three families.

A weight is a module whose ``forward()`` returns W ``(d, d)``. It may state what it knows of W, and
solvers follow it: ``tags`` (a frozenset of "orthogonal", "symmetric"), ``norm_bound()`` (a bound on
the 2-norm of W that holds at any time in training, or None) and, for symmetric W,
``eigenvalue_bound()`` (the same for its largest eigenvalue). Any module of this shape can be
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

from ..errors import check_choice, check_options
from ..ops import symmetric_part
from .factor_cache import orthogonal_factor
from .maps import OrthogonalMap, SymmetricMap

TAGS = ("orthogonal", "symmetric")


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
    options: tuple[str, ...] = ()  # beyond those of every family

    def __init__(
        self,
        features: int,
        scale: float,
        *,
        parametrized: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: object,
    ):
        check_options(
            unknown, (*self.options, "parametrized", "device", "dtype"), type(self).__name__
        )
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


class Orthogonal(_Structured):
    """``W = scale * Q``, Q orthogonal and Haar distributed at initialisation.

    ``parametrized=True`` trains an unconstrained matrix whose QR factor is Q, so W stays orthogonal
    and its norm stays ``scale``; ``parametrized=False`` trains W itself from an orthogonal start.
    The unconstrained matrix starts at Q too, perfectly conditioned. Q is kept until it changes.

    Args:
        features: d.
        scale: every singular value of W.
        max_scale: the scale is learned and stays below this: ``max_scale * sigmoid(raw_scale)``,
            starting at ``scale``. None: it is fixed.
        options: ``parametrized`` as above, ``device`` and ``dtype`` of the parameters.

    Raises:
        ValueError: ``max_scale`` without ``parametrized``, not finite, or not above
            ``scale > 0``.
    """

    structure = "orthogonal"
    options = ("max_scale",)
    stored_scale: Tensor
    raw_scale: nn.Parameter

    def __init__(
        self, features: int, scale: float, *, max_scale: float | None = None, **options: Any
    ):
        if max_scale is not None:
            _check_max_scale(scale, max_scale, options.get("parametrized", True))
        super().__init__(features, scale, **options)
        self.map = OrthogonalMap()
        self.max_scale = None if max_scale is None else float(max_scale)
        # W depends on the scale, so a state_dict carries it.
        if self.max_scale is not None:
            self.raw_scale = nn.Parameter(self.weight.new_empty(()))
            self._reset_scale()
            self.register_buffer("stored_max_scale", self.weight.new_tensor(self.max_scale))
        elif self.parametrized:
            self.register_buffer("stored_scale", self.weight.new_tensor(self.scale))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_()
        self.weight.copy_(orthogonal_factor(self.weight))
        if not self.parametrized:
            self.weight.mul_(self.scale)
        elif getattr(self, "max_scale", None) is not None:
            self._reset_scale()

    @torch.no_grad()
    def _reset_scale(self) -> None:
        assert self.max_scale is not None
        wide = torch.promote_types(self.raw_scale.dtype, torch.float32)
        self.raw_scale.fill_(math.log(self.scale / (_below(self.max_scale, wide) - self.scale)))

    def norm_bound(self) -> float | None:
        if not self.parametrized:
            return None
        return abs(self.scale) if self.max_scale is None else self.max_scale

    def current_scale(self) -> float | Tensor:
        """The scale now: a float, or a tensor where it is learned."""
        if self.max_scale is None:
            return self.scale
        raw = self.raw_scale.to(torch.promote_types(self.raw_scale.dtype, torch.float32))
        return _below(self.max_scale, raw.dtype) * torch.sigmoid(raw)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A rounded copy of the own scale (a module in bfloat16) leaves the exact one in place.
        for name in ("scale", "max_scale"):
            stored = getattr(self, f"stored_{name}", None)
            loaded = state_dict.get(f"{prefix}stored_{name}")
            if stored is not None and loaded is not None and float(loaded) != float(stored):
                setattr(self, name, float(loaded))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def compose(self, raw: Tensor) -> Tensor:
        return self.current_scale() * self.map.orthogonal(raw)

    def extra_repr(self) -> str:
        learned = "" if self.max_scale is None else f", max_scale={self.max_scale}"
        return super().extra_repr() + learned


def _below(bound: float, dtype: torch.dtype) -> float:
    # Where the sigmoid is rounded to 1, the product must not be rounded up.
    return bound * (1 - torch.finfo(dtype).eps)


def _check_max_scale(scale: float, max_scale: float, parametrized: bool) -> None:
    if not parametrized:
        raise ValueError("max_scale needs parametrized=True: otherwise W itself is learned.")
    if (
        not isinstance(max_scale, numbers.Real)
        or not 0 < scale < _below(max_scale, torch.float32) < math.inf
    ):
        raise ValueError(
            "a learned scale starts inside its bound: 0 < scale < max_scale < infinity is needed, "
            f"got scale={scale!r} and max_scale={max_scale!r}."
        )


class Symmetric(_Structured):
    """``W = W^T``, entries of variance ``scale^2 / (4 d)`` off the diagonal and twice that on it.

    ``parametrized=True`` trains A with ``W = (A + A^T) / 2``, exactly symmetric at all times;
    ``parametrized=False`` trains W itself from a symmetric start.

    Args:
        features: d.
        scale: spectral radius at the start, in the limit of large d.
        max_eigenvalue: b > 0: ``W = S min(1, b / lambda_max(S))`` with S as above. With b < 1 and a
            monotone, nonexpansive activation the equilibrium is unique. None: no bound.
        options: ``parametrized`` as above, ``device`` and ``dtype`` of the parameters.

    Raises:
        ValueError: ``max_eigenvalue`` without ``parametrized``, or not positive and finite.
    """

    structure = "symmetric"
    options = ("max_eigenvalue",)

    def __init__(
        self, features: int, scale: float, *, max_eigenvalue: float | None = None, **options: Any
    ):
        if max_eigenvalue is not None and not options.get("parametrized", True):
            raise ValueError(
                "max_eigenvalue needs parametrized=True: otherwise W itself is learned."
            )
        bounded = SymmetricMap(max_eigenvalue)
        super().__init__(features, scale, **options)
        self.map = bounded

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(std=self.scale / math.sqrt(2 * self.features))
        if not self.parametrized:
            self.weight.copy_(symmetric_part.reference(self.weight))

    def eigenvalue_bound(self) -> float | None:
        """What no eigenvalue of W exceeds at any time in training, or None."""
        return self.map.max_eigenvalue

    def compose(self, raw: Tensor) -> Tensor:
        bounded: Tensor = self.map(raw)
        return bounded

    def extra_repr(self) -> str:
        bound = self.map.max_eigenvalue
        return super().extra_repr() + ("" if bound is None else f", max_eigenvalue={bound}")


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
