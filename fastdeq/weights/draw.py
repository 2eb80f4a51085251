"""Values of the three families for the square weights of any module."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import symmetric_part
from .factor_cache import orthogonal_factor
from .square import Square


def drawn(square: Square, family: str, radius: float, generator: torch.Generator | None) -> Tensor:
    """Values for the whole weight, in the dtype that they are drawn in."""
    dtype = torch.promote_types(square.tensor.dtype, torch.float32)
    values = torch.zeros_like(square.tensor, dtype=dtype, requires_grad=False)
    for view in square.views(values):
        draw = torch.empty(view.shape, dtype=dtype, device=view.device)
        if family == "dense":
            draw.normal_(std=radius / math.sqrt(len(view)), generator=generator)
        elif family == "orthogonal":
            draw = radius * orthogonal_factor(draw.normal_(generator=generator))
        else:
            draw.normal_(std=radius / math.sqrt(2 * len(view)), generator=generator)
            draw = symmetric_part.reference(draw)
        view.copy_(draw)
    return values
