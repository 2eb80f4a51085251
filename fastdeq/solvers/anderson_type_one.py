"""The mixing step of Anderson acceleration of type I, in plain PyTorch.

    s_i = z_k - z_i, y_i = g_k - g_i     differences to the newest of the history, S and Y of them
    gamma                                S^T Y gamma = S^T g_k
    z_+ = f_k - sum gamma_i (s_i + y_i) - (1 - beta) (g_k - sum gamma_i y_i)

Type II takes the gamma that makes ``|g_k - Y gamma|`` least; here that remainder is orthogonal to
the steps instead. The step is ``z_k - H g_k`` with ``H Y = S``, H the inverse of the Jacobian that
differs least from -I and maps S to Y: the multi-secant method of Broyden's "good" family, as type
II is of his "bad" one. On linear maps it is the full orthogonalisation method where type II is
GMRES.

Sources: H. Fang and Y. Saad, Numer. Linear Algebra Appl. 16 (2009) 197; H. Walker and P. Ni, SIAM
J. Numer. Anal. 49 (2011) 1715, theorem 2.8.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mix_type_one(
    f_history: Tensor,
    g_history: Tensor,
    gram: Tensor,
    count: Tensor,
    newest: int,
    damping: float,
    regularization: float,
    rank_tolerance: float,
    max_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments and results of ``ops.anderson_mix``; ``gram`` is not used.

    S and Y are scaled to unit columns first. The ridge is subtracted: where the map contracts the
    diagonal of ``S^T Y`` is negative, and more of it leads to gamma = 0, the plain step. A column
    whose pivot is at or below ``rank_tolerance`` is dropped from both, newest first.
    """
    capacity = f_history.shape[1]
    age = torch.arange(1, capacity, device=count.device)
    order = (newest - age) % capacity
    valid = age <= count.unsqueeze(1)
    f, g = f_history[:, newest], g_history[:, newest]
    df = f.unsqueeze(1) - f_history.index_select(1, order)
    dg = g.unsqueeze(1) - g_history.index_select(1, order)
    ds = (df - dg).double()
    y, wide = dg.double(), g.double()
    s_length = torch.linalg.vector_norm(ds, dim=2)
    y_length = torch.linalg.vector_norm(y, dim=2)
    usable = valid & (s_length > 0) & (y_length > 0) & (s_length + y_length).isfinite()
    # An unused entry may hold anything: zero by selection, as 0 * NaN is NaN.
    y_length = torch.where(usable, y_length, 1.0)
    ds = torch.where(usable[:, :, None], ds / s_length[:, :, None], 0.0)
    y = torch.where(usable[:, :, None], y / y_length[:, :, None], 0.0)
    matrix = torch.bmm(ds, y.transpose(1, 2))
    rhs = torch.bmm(ds, wide.unsqueeze(2)).squeeze(2)
    matrix.diagonal(dim1=1, dim2=2).sub_(regularization)
    gamma, kept = _solve(matrix, rhs, usable, rank_tolerance)
    gamma = gamma / y_length
    # Written so that a NaN sum counts as rejected.
    rejected = ~(gamma.abs().sum(1) <= max_weight)
    gamma = torch.where(rejected.unsqueeze(1), 0.0, gamma).to(f.dtype)
    change = torch.where(usable[:, :, None], df - (1 - damping) * dg, 0.0)
    z = f - (1 - damping) * g - torch.bmm(gamma.unsqueeze(1), change).squeeze(1)
    return z, (valid.sum(1) - kept.sum(1)).to(torch.int32), rejected


def _solve(
    matrix: Tensor, rhs: Tensor, usable: Tensor, rank_tolerance: float
) -> tuple[Tensor, Tensor]:
    """x ``(B, m)`` with ``matrix x = rhs`` in the columns kept ``(B, m)`` bool, 0 in others."""
    kept = usable.clone()
    for j in range(matrix.shape[1]):  # Gauss-Jordan elimination
        pivot = matrix[:, j, j]
        keep = kept[:, j] & (pivot.abs() > rank_tolerance)
        kept[:, j] = keep
        factor = torch.where(keep[:, None], matrix[:, :, j] / pivot[:, None], 0.0)
        factor[:, j] = 0
        matrix = matrix - factor[:, :, None] * matrix[:, j : j + 1, :]
        rhs = rhs - factor * rhs[:, j : j + 1]
    return torch.where(kept, rhs / matrix.diagonal(dim1=1, dim2=2), 0.0), kept
