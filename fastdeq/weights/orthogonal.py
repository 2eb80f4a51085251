"""Orthogonal weights: ``W = s Q``, with a fixed or a learned scale s."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import lists_options
from .attached import is_modified
from .dense import Structured
from .factor_cache import is_transformed, orthogonal_factor
from .maps import OrthogonalMap


class Orthogonal(Structured):
    """``W = scale * Q``, Q orthogonal and Haar distributed at initialisation.

    The unconstrained matrix starts at Q too, perfectly conditioned. Q is kept until it changes.

    Args:
        features: d.
        scale: every singular value of W.
        max_scale: the scale is learned and stays below this: ``max_scale * sigmoid(raw_scale)``,
            starting at ``scale``. None: it is fixed.
        parametrized: True trains an unconstrained matrix whose QR factor is Q, so W stays
            orthogonal and its norm stays ``scale``; False trains W itself from an orthogonal start.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: ``max_scale`` without ``parametrized``, not finite, or not above
            ``scale > 0``.
    """

    structure = frozenset({"orthogonal"})
    stored_scale: Tensor
    raw_scale: nn.Parameter

    @lists_options("Orthogonal")
    def __init__(
        self,
        features: int,
        scale: float,
        *,
        max_scale: float | None = None,
        parametrized: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if max_scale is not None:
            _check_max_scale(scale, max_scale, parametrized)
        super().__init__(features, scale, parametrized=parametrized, device=device, dtype=dtype)
        self.map = OrthogonalMap()
        self.max_scale = None if max_scale is None else float(max_scale)
        # W depends on the scale, so a state_dict carries it.
        if self.max_scale is not None:
            self.raw_scale = nn.Parameter(self.weight.new_empty(()))
            self.register_buffer("stored_max_scale", self.weight.new_empty(()))
        elif self.parametrized:
            self.register_buffer("stored_scale", self.weight.new_empty(()))
        self._reset_scale()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_()
        self.weight.copy_(orthogonal_factor(self.weight))
        if not self.parametrized:
            self.weight.mul_(self.scale)
        self._reset_scale()

    @torch.no_grad()
    def _reset_scale(self) -> None:
        for name, value in self._stored():
            self._buffers[name].fill_(value)  # type: ignore[union-attr]
        raw = self._parameters.get("raw_scale")
        if raw is not None:
            assert self.max_scale is not None
            wide = torch.promote_types(raw.dtype, torch.float32)
            raw.fill_(math.log(self.scale / (_below(self.max_scale, wide) - self.scale)))

    def _stored(self) -> list[tuple[str, float]]:
        """The buffers that carry a number through a state_dict, with that number."""
        names = ("scale", "max_scale")
        return [(f"stored_{n}", getattr(self, n)) for n in names if f"stored_{n}" in self._buffers]

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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # The attribute is what W was made with. A buffer may not have it: it has been allocated
        # without values (to_empty), or the attribute was set since.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._stored():
            destination[prefix + name] = torch.full_like(destination[prefix + name], value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A rounded copy of the own number, in the dtype of the checkpoint or of this module, leaves
        # the exact one in place. The buffer itself may be on the meta device.
        for name, own in self._stored():
            loaded = state_dict.get(prefix + name)
            if loaded is None or is_transformed(loaded):
                continue
            dtypes = (loaded.dtype, self._buffers[name].dtype)  # type: ignore[union-attr]
            if float(loaded) not in [float(torch.tensor(own, dtype=t)) for t in dtypes]:
                setattr(self, name.removeprefix("stored_"), float(loaded))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def compose(self, raw: Tensor) -> Tensor:
        if is_modified(self.map) or type(self.map) is not OrthogonalMap:
            q: Tensor = self.map(raw)  # a hook on the map, or another forward, is to be run
        else:
            q = self.map.orthogonal(raw)  # spares the map's own multiplication by 1
        return self.current_scale() * q

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
