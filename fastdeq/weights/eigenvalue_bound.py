"""Symmetric matrices with eigenvalues that a bound b does not let pass: ``S min(1, b / lambda)``,
lambda the largest eigenvalue of S.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .factor_cache import has_tangent, is_transformed, wide_dtype


class Shrinkage(NamedTuple):
    """``min(1, b / lambda)`` and what its derivative needs."""

    factor: Tensor  # (), float32 or float64
    vector: Tensor | None  # (n,) float64: the eigenvector of lambda, where it was asked for


def bounded(s: Tensor, bound: float | None) -> Tensor:
    """``S min(1, b / lambda)``, differentiable; S itself where that is surely below b."""
    if bound is None or s.numel() == 0:
        return s
    with torch.autocast(s.device.type, enabled=False):
        if surely_below(s, bound):
            return s
        return (wide_dtype(s) * shrinkage(s, bound).factor).to(s.dtype)


def surely_below(s: Tensor, bound: float) -> bool:
    """Whether no eigenvalue of s is above the bound, as far as a factorisation proves it."""
    if is_transformed(s) or has_tangent(s):
        return False
    n = len(s)
    with torch.no_grad():
        wide = wide_dtype(s.detach())
        shifted = torch.diag_embed(wide.new_full((n,), bound)) - wide
        # A Cholesky factorisation that runs through proves this little less (Rump, BIT 46
        # (2006) 433): gamma = (n + 1) u times the trace.
        shifted.diagonal().sub_((n + 2) * torch.finfo(wide.dtype).eps * shifted.trace())
        return not torch.linalg.cholesky_ex(shifted).info.item()


def shrinkage(s: Tensor, bound: float, with_vector: bool = False) -> Shrinkage:
    """``min(1, b / lambda)``, a little less: no rounding error may cross the bound."""
    exact = s.double()
    # LAPACK raises on NaN; the factor does not matter then, s has it.
    finite = torch.where(exact.isfinite().all(), exact, 0.0)
    vector = None
    if with_vector:
        values, vectors = torch.linalg.eigh(finite)
        vector = vectors[:, -1].clone()
    else:
        values = torch.linalg.eigvalsh(finite)
    # Rounding moves entries by eps/2 twice, a matrix by no more than its Frobenius norm.
    rounding = 2 * torch.finfo(s.dtype).eps + 16 * math.sqrt(len(s)) * 2.0**-52
    largest = values[-1] + rounding * torch.linalg.matrix_norm(exact.detach())
    factor: Tensor = bound / largest.clamp(min=bound)
    return Shrinkage(factor.to(wide_dtype(s).dtype), vector)
