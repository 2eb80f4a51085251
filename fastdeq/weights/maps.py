"""Maps from an unconstrained matrix to an orthogonal or a symmetric one, for weights and for
``torch.nn.utils.parametrize``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import symmetric_part
from .factor_cache import FactorCache, has_tangent, is_transformed, orthogonal_factor, wide_dtype


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

    def forward(self, raw: Tensor) -> Tensor:
        """The structured matrix ``(n, n)``, a new tensor."""
        _check_matrix(raw, "SymmetricMap", square=True)
        # a + b == b + a, so this is symmetric to the last bit, and so is a multiple of it.
        transformed = is_transformed(raw) or has_tangent(raw)
        part = torch.ops.fastdeq.symmetric_part
        s: Tensor = symmetric_part.reference(raw) if transformed else part(raw)
        if self.max_eigenvalue is None or s.numel() == 0:
            return s
        with torch.autocast(s.device.type, enabled=False):
            if self._surely_below(s):
                return s
            return (wide_dtype(s) * self._shrinkage(s)).to(s.dtype)

    def _surely_below(self, s: Tensor) -> bool:
        if is_transformed(s) or has_tangent(s):
            return False
        bound, n = self.max_eigenvalue, len(s)
        assert bound is not None
        with torch.no_grad():
            wide = wide_dtype(s.detach())
            shifted = torch.diag_embed(wide.new_full((n,), bound)) - wide
            # A Cholesky factorisation that runs through proves this little less (Rump, BIT 46
            # (2006) 433): gamma = (n + 1) u times the trace.
            shifted.diagonal().sub_((n + 2) * torch.finfo(wide.dtype).eps * shifted.trace())
            return not torch.linalg.cholesky_ex(shifted).info.item()

    def _shrinkage(self, s: Tensor) -> Tensor:
        """``min(1, b / lambda_max)``, a little less: no rounding error may cross the bound."""
        exact = s.double()
        # LAPACK raises on NaN; the factor does not matter then, s has it.
        largest = torch.linalg.eigvalsh(torch.where(exact.isfinite().all(), exact, 0.0))[-1]
        # Rounding moves entries by eps/2 twice, a matrix by no more than its Frobenius norm.
        rounding = 2 * torch.finfo(s.dtype).eps + 16 * math.sqrt(len(s)) * 2.0**-52
        largest = largest + rounding * torch.linalg.matrix_norm(exact.detach())
        factor: Tensor = self.max_eigenvalue / largest.clamp(min=self.max_eigenvalue)
        return factor.to(wide_dtype(s).dtype)

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
