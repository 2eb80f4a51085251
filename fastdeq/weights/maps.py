"""Maps from an unconstrained matrix to an orthogonal or a symmetric one, for weights and for
``torch.nn.utils.parametrize``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .eigenvalue_bound import bounded
from .factor_cache import FactorCache, orthogonal_factor
from .symmetric_cache import SymmetricCache, may_be_kept, symmetric_part_of


class OrthogonalMap(nn.Module):
    """``scale * Q``: Q has orthonormal columns, or rows where the matrix is wide.

    For ``torch.nn.utils.parametrize.register_parametrization(linear, "weight", OrthogonalMap())``.
    The raw matrix starts at Q itself, so it is perfectly conditioned, and Q stays the matrix's
    factor ``raw = Q R``, R with a positive diagonal (transposed for wide ones).

    Args:
        scale: every singular value of the result; finite.

    Raises:
        ValueError: a scale that is not finite; a tensor that is not a matrix.
    """

    def __init__(self, scale: float = 1.0):
        super().__init__()
        if not math.isfinite(scale):
            raise ValueError(f"OrthogonalMap needs a finite scale, got {scale!r}.")
        self.scale = float(scale)
        self.cache = FactorCache()

    def orthogonal(self, raw: Tensor) -> Tensor:
        """Q ``(m, n)``, not to be written to: it may be the cached one."""
        _check_matrix(raw, "OrthogonalMap")
        return self.cache.orthogonal(raw)

    def forward(self, raw: Tensor) -> Tensor:
        """The structured matrix ``(m, n)``, a new tensor."""
        return self.scale * self.orthogonal(raw)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """A raw matrix for ``weight``, which is made orthonormal first where it is not."""
        _check_matrix(weight, "OrthogonalMap")
        q = weight if self.scale >= 0 else -weight
        if q.shape[0] < q.shape[1]:
            return orthogonal_factor(q.t()).t().contiguous()
        return orthogonal_factor(q)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class SymmetricMap(nn.Module):
    """``(raw + raw^T) / 2``, exactly symmetric, its eigenvalues bounded from above if asked for.

    ``max_eigenvalue=b`` gives ``W = S min(1, b / lambda_max(S))``. With b < 1 and a monotone
    activation of slope at most 1, ``z = phi(W z + c)`` has exactly one solution, however negative
    the other eigenvalues are (Winston and Kolter, NeurIPS 2020, with m = 1 - b). A Cholesky
    factorisation of ``b I - S`` tells whether eigenvalues have to be computed at all.

    Args:
        max_eigenvalue: b > 0, or None for no bound.

    Raises:
        ValueError: a bound that is not positive and finite; a tensor that is not a square matrix.
    """

    def __init__(self, max_eigenvalue: float | None = None):
        super().__init__()
        if max_eigenvalue is not None and not 0 < max_eigenvalue < math.inf:
            raise ValueError(
                f"max_eigenvalue must be positive and finite, or None; got {max_eigenvalue!r}."
            )
        self.max_eigenvalue = None if max_eigenvalue is None else float(max_eigenvalue)
        self.cache = SymmetricCache()

    def forward(self, raw: Tensor) -> Tensor:
        """The structured matrix ``(n, n)``, a new tensor."""
        _check_matrix(raw, "SymmetricMap", square=True)
        return bounded(symmetric_part_of(raw), self.max_eigenvalue)

    def shared(self, raw: Tensor) -> Tensor:
        """``forward(raw)``, or a view of what it was for as long as raw does not change.

        Whoever writes to it changes what other calls were given; the next call makes it anew.
        """
        _check_matrix(raw, "SymmetricMap", square=True)
        if may_be_kept(raw):
            return self.cache.weight(raw, self.max_eigenvalue)
        return self.forward(raw)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A raw matrix for ``weight``: the nearest symmetric one."""
        _check_matrix(weight, "SymmetricMap", square=True)
        part: Tensor = torch.ops.fastdeq.symmetric_part(weight)
        return part

    def extra_repr(self) -> str:
        return "" if self.max_eigenvalue is None else f"max_eigenvalue={self.max_eigenvalue}"


def _check_matrix(t: Tensor, owner: str, square: bool = False) -> None:
    if t.dim() != 2:
        raise ValueError(f"{owner} needs a matrix, got a tensor of shape {tuple(t.shape)}.")
    if square and t.shape[0] != t.shape[1]:
        raise ValueError(f"{owner} needs a square matrix, got one of shape {tuple(t.shape)}.")
