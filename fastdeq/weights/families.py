"""Recurrent weights: the three families by name.

A weight is a module whose ``forward()`` returns W ``(d, d)``. It may state what it knows of W, and
solvers follow it: ``tags`` (a frozenset of "orthogonal", "symmetric"), ``norm_bound()`` (a bound on
the 2-norm of W that holds at any time in training, or None) and, for symmetric W,
``eigenvalue_bound()`` (the same for its largest eigenvalue). Any module of this shape can be
``AffineCell(weight=...)``. When what it states is believed: statements.py.

Scale: the spectral radius in the limit of large d. Circular law for dense entries of variance
s^2/d (Girko 1985), semicircle on [-s, s] for symmetric ones of variance s^2/(4d) (Wigner 1958).
The families and their comparison: Agarwala and Schoenholz, ICML 2022.
"""

from __future__ import annotations

import math
import numbers
from typing import Literal

import torch
from torch import nn

from ..errors import check_choice
from .dense import Dense
from .orthogonal import Orthogonal
from .symmetric import Symmetric

WeightName = Literal["dense", "orthogonal", "symmetric"]
WEIGHTS: dict[str, type[Dense]] = {"dense": Dense, "orthogonal": Orthogonal, "symmetric": Symmetric}
#: Below 1: at large d every family's linear cell converges, the orthogonal one at any d.
DEFAULT_SCALE = 0.9


def make_weight(
    weight: WeightName | nn.Module,
    features: int,
    scale: float | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """A weight module from a family's name and a scale, by default ``DEFAULT_SCALE``, or a weight
    object as it is.

    Raises:
        ValueError: unknown name; a scale that is negative or not finite, or beside an object.
        TypeError: neither a name nor a module.
    """
    if isinstance(weight, nn.Module):
        if scale is not None:
            raise ValueError("scale belongs to the weight object: pass it there, not to the cell.")
        return weight
    if not isinstance(weight, str):
        raise TypeError(f"weight must be a name or a module that returns W, not {weight!r}.")
    check_choice(weight, WEIGHTS, "weight")
    scale = DEFAULT_SCALE if scale is None else scale
    if not isinstance(scale, numbers.Real) or not 0 <= scale < math.inf:
        raise ValueError(
            f"weight={weight!r} needs a finite scale >= 0, e.g. scale=0.9; got {scale!r}."
        )
    return WEIGHTS[weight](features, scale, device=device, dtype=dtype)
