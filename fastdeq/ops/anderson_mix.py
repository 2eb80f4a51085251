"""``fastdeq::anderson_mix``: one step of Anderson acceleration for each sample on its own.

Symbols: B samples of size n; m entries of history in a ring buffer; g = f(z) - z the residual of an
iterate z; k the place of the newest entry; gamma the mixing coefficients; beta the damping.

For CPU tensors it is in C++ (csrc/cpu/anderson_mix.cpp), for CUDA tensors in Triton
(kernels/anderson_mix.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.choose import check_device, triton_missing
from ..errors import BackendError

Mixed = tuple[Tensor, Tensor, Tensor]

torch.library.define(
    "fastdeq::anderson_mix",
    "(Tensor f_history, Tensor g_history, Tensor(a!) gram, Tensor count, int newest, "
    "float damping, float regularization, float rank_tolerance, float max_weight) "
    "-> (Tensor z, Tensor dropped, Tensor rejected)",
)


def reference(
    f_history: Tensor,
    g_history: Tensor,
    gram: Tensor,
    count: Tensor,
    newest: int,
    damping: float,
    regularization: float,
    rank_tolerance: float,
    max_weight: float,
) -> Mixed:
    """One step of Anderson acceleration (type II) for each sample on its own.

    With differences to the newest entry k, ``dg_i = g_k - g_i`` and ``df_i = f_k - f_i``, finds
    the gamma that minimises ``|g_k - sum gamma_i dg_i|^2`` (plus a ridge) and returns

        ``z = f_k - sum gamma_i df_i - (1 - beta) (g_k - sum gamma_i dg_i)``.

    gamma = 0 is the plain damped step, so regularising and dropping columns lead back to it. The
    columns are scaled to unit norm first: ridge and rank cut are relative to the data and keep
    their meaning near convergence. Columns are eliminated newest first; one whose pivot falls to
    ``rank_tolerance`` or below depends on newer ones and is dropped.

    Args:
        f_history: ``(B, m, n)`` float32 or float64, values f(z) in a ring buffer.
        g_history: ``(B, m, n)``, same dtype, their residuals.
        gram: ``(B, m, m)`` float64, inner products of ``g_history``; row and column ``newest`` are
            written by this call.
        count: ``(B,)`` int32, valid entries before the newest, at most m - 1; they are the most
            recent ones.
        newest: position of the newest entry, in ``[0, m)``.
        damping: beta in (0, 1].
        regularization: ridge on the unit-norm columns, >= 0.
        rank_tolerance: smallest pivot kept, relative to a unit column, >= 0.
        max_weight: largest 1-norm of gamma before the sample takes the plain step instead.

    Returns:
        ``z (B, n)``; the number of dropped columns ``(B,)`` int32; whether the weights were
        rejected ``(B,)`` bool. A sample with NaN in its history affects no other.

    Source: D. G. Anderson, J. ACM 12 (1965) 547; H. Walker and P. Ni, SIAM J. Numer. Anal. 49
    (2011) 1715.
    """
    capacity = f_history.shape[1]
    f, g = f_history[:, newest], g_history[:, newest]
    row = torch.einsum("bmn,bn->bm", g_history.double(), g.double())
    gram[:, newest, :] = row
    gram[:, :, newest] = row

    age = torch.arange(1, capacity, device=count.device)
    newest_first = (
        newest - age
    ) % capacity  # on the device: an index made of a list is copied there
    valid = age <= count.unsqueeze(1)
    gamma, dropped = _solve_small(gram, newest, newest_first, valid, regularization, rank_tolerance)
    # Written so that a NaN sum counts as rejected.
    rejected = ~(gamma.abs().sum(1) <= max_weight)
    gamma = torch.where(rejected.unsqueeze(1) | (gamma == 0), 0.0, gamma).to(f.dtype)

    z = f - (1 - damping) * g
    for i in range(capacity - 1):
        j, weight = (newest - 1 - i) % capacity, gamma[:, i : i + 1]
        difference = f - f_history[:, j] - (1 - damping) * (g - g_history[:, j])
        # An unused entry may hold anything, NaN included: 0 * NaN must not enter.
        z = z - torch.where(weight == 0, 0.0, weight * difference)
    return z, dropped, rejected


def _solve_small(
    gram: Tensor,
    newest: int,
    newest_first: Tensor,
    valid: Tensor,
    regularization: float,
    rank_tolerance: float,
) -> tuple[Tensor, Tensor]:
    """gamma ``(B, m - 1)``, ordered as ``newest_first``, and the number of columns dropped."""
    diagonal = gram[:, newest, newest]
    to_newest = gram[:, newest].index_select(1, newest_first)
    pairs = gram.index_select(1, newest_first).index_select(2, newest_first)
    # <g_k - g_i, g_k - g_j> and <g_k - g_i, g_k>, from products that float64 holds exactly enough.
    matrix = diagonal[:, None, None] - to_newest[:, :, None] - to_newest[:, None, :] + pairs
    rhs = diagonal[:, None] - to_newest
    square = matrix.diagonal(dim1=1, dim2=2)
    usable = valid & (square > 0) & square.isfinite()
    scale = torch.where(usable, square, 1.0).rsqrt() * usable
    # Zero by selection, not by product: 0 * NaN is NaN.
    both = usable[:, :, None] & usable[:, None, :]
    matrix = torch.where(both, matrix * scale[:, :, None] * scale[:, None, :], 0.0)
    rhs = torch.where(usable, rhs * scale, 0.0)
    matrix.diagonal(dim1=1, dim2=2).add_(regularization)

    kept = usable.clone()
    for j in range(len(newest_first)):  # Gauss-Jordan; pivots equal those of an LDL^T
        pivot = matrix[:, j, j]
        keep = kept[:, j] & (pivot > rank_tolerance)
        kept[:, j] = keep
        factor = torch.where(keep[:, None], matrix[:, :, j] / pivot[:, None], 0.0)
        factor[:, j] = 0
        matrix = matrix - factor[:, :, None] * matrix[:, j : j + 1, :]
        rhs = rhs - factor * rhs[:, j : j + 1]
    pivots = matrix.diagonal(dim1=1, dim2=2)
    gamma = torch.where(kept, rhs / pivots, 0.0) * scale
    return gamma, (valid.sum(1) - kept.sum(1)).to(torch.int32)


torch.library.impl("fastdeq::anderson_mix", "CompositeExplicitAutograd", reference)


@torch.library.register_fake("fastdeq::anderson_mix")
def _fake(f_history: Tensor, g_history: Tensor, gram: Tensor, count: Tensor, *_: float) -> Mixed:
    batch, _capacity, size = f_history.shape
    return (
        f_history.new_empty(batch, size),
        count.new_empty(batch, dtype=torch.int32),
        count.new_empty(batch, dtype=torch.bool),
    )


def _by_triton(*arguments: Any) -> Mixed:
    from ..kernels.anderson_mix import MAX_CAPACITY, anderson_mix  # slow to import: only when used

    if arguments[0].shape[1] > MAX_CAPACITY:
        raise BackendError(
            f"backend='triton' has Anderson windows up to {MAX_CAPACITY - 1}, not "
            f"{arguments[0].shape[1] - 1}: a block has no more registers. Use backend='auto'."
        )
    return anderson_mix(*arguments)  # type: ignore[no-any-return]


def _not_in_cuda(*arguments: Any) -> Mixed:
    raise BackendError(
        "backend='cuda' has no Anderson acceleration for general maps: on a GPU that is in Triton. "
        "Use backend='auto' or 'triton', or a solver that does not mix."
    )


def _on_cuda(*arguments: Any) -> Mixed:
    from ..kernels.anderson_mix import MAX_CAPACITY

    return (_by_triton if arguments[0].shape[1] <= MAX_CAPACITY else reference)(*arguments)


if not triton_missing():
    torch.library.impl("fastdeq::anderson_mix", "CUDA", _on_cuda)


def implementation(backend: str, device: torch.device) -> Callable[..., Mixed]:
    """The operator as ``backend`` has it, for tensors on ``device``.

    Raises:
        ValueError: unknown backend. BackendError: a known one that cannot run on this device.
    """
    check_device(backend, device.type)
    own = {"reference": reference, "triton": _by_triton, "cuda": _not_in_cuda}
    found: Callable[..., Mixed] = own.get(backend, torch.ops.fastdeq.anderson_mix)
    return found
