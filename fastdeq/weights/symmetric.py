"""Symmetric weights: ``W = (A + A^T) / 2``, with a bound on the eigenvalues if asked for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import lists_options
from ..ops import symmetric_part
from .attached import is_modified
from .dense import Structured
from .maps import SymmetricMap


class Symmetric(Structured):
    """``W = W^T``, entries of variance ``scale^2 / (4 d)`` off the diagonal and twice that on it.

    A parametrised W is kept for as long as A does not change, and calls return views of it: take a
    clone to write to. An in-place operation on one is noticed, a write to its ``data`` or through
    NumPy is not.

    Args:
        features: d.
        scale: spectral radius at the start, in the limit of large d.
        max_eigenvalue: b > 0: ``W = S min(1, b / lambda_max(S))`` with S as below. With b < 1 and a
            monotone, nonexpansive activation the equilibrium is unique. None: no bound.
        parametrized: True trains A with ``S = (A + A^T) / 2``, exactly symmetric at all times;
            False trains W itself from a symmetric start.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: ``max_eigenvalue`` without ``parametrized``, or not positive and finite.
    """

    structure = frozenset({"symmetric"})

    @lists_options("Symmetric")
    def __init__(
        self,
        features: int,
        scale: float,
        *,
        max_eigenvalue: float | None = None,
        parametrized: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if max_eigenvalue is not None and not parametrized:
            raise ValueError(
                "max_eigenvalue needs parametrized=True: otherwise W itself is learned."
            )
        bounded = SymmetricMap(max_eigenvalue)
        super().__init__(features, scale, parametrized=parametrized, device=device, dtype=dtype)
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
        if type(self.map) is SymmetricMap and not is_modified(self.map):
            return self.map.shared(raw)
        bounded: Tensor = self.map(raw)
        return bounded

    def extra_repr(self) -> str:
        bound = self.map.max_eigenvalue
        return super().extra_repr() + ("" if bound is None else f", max_eigenvalue={bound}")
