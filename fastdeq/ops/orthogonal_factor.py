"""``fastdeq::orthogonal_factor`` and its gradient: ``A = Q R`` with ``R_ii > 0``.

    A (m, n), m >= n    Q (m, n), Q^T Q = I    R (n, n) upper triangular    E = Q^T Q - I

With a positive diagonal of R both factors are unique and smooth wherever A has full rank.

*Householder*: ``torch.linalg.qr``, signs and, for large A, a first-order pass: ``Q (I - U)`` and
``(I + U) R`` with ``U = triu(E, 1) + diag(E) / 2`` leave ``|E|^2`` of ``|E|``. Any A, of any
rank.

*Cholesky*: block Gram-Schmidt, gram_schmidt.py. Products of matrices, but every panel reads numbers
on the host, for each of which a GPU would be waited for.

*CholeskyQR2*, for GPUs: cholesky_qr2.py. It reads one number on the host, at the end, and none
while a CUDA graph is captured.

Gradient (Walter and Lehmann, arXiv:1009.6112; Roberts and Roberts, arXiv:2009.10071), which reuses
R: ``dA = (dQ + Q copyltu(M)) R^-T``, ``M = R dR^T - dQ^T Q``, copyltu(M) the symmetric matrix with
the lower triangle of M. For square Q without dR it is ``Q tril(X - X^T, -1) R^-T``,
``X = Q^T dQ``: two of its three products are with triangular matrices.

Operations for m = n, in products of n x n matrices (2 n^3): Householder QR 4/3, Cholesky 9/8 (8
panels), the gradient 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cuda_stream import is_capturing
from ..errors import check_choice
from .cholesky_qr2 import cholesky_qr2, prefers_cholesky_qr2
from .gram_schmidt import (
    Factors,
    block_size,
    first_order_pass,
    gram_schmidt,
    half_upper,
    is_orthonormal,
)
from .kept_factors import FactorMemory

METHODS = ("auto", "householder", "cholesky", "cholesky_qr2")
#: The least number of columns at which Gram-Schmidt beats LAPACK on a CPU (two Zen 4 cores).
CHOLESKY_FROM = 160
#: LAPACK's own Q in float32 has errors near 1e-6 from about twice this many columns on.
_REFINE_FROM = 129
#: What compiled layers factorised last, for as long as it does not change; 64 MiB are the factors
#: and the copy of a float32 matrix of 2300 x 2300, or of 80 of 256 x 256.
memory = FactorMemory(64 << 20)


def factors(a: Tensor, method: str = "auto") -> Factors:
    """Q and R of ``a`` ``(m, n)``, float32 or float64, ``m >= n``, without a gradient.

    "auto" is CholeskyQR2 on a GPU, if the extension is there; elsewhere Q by Cholesky factors from
    ``CHOLESKY_FROM`` columns on. It is Householder below that and wherever the measured
    orthogonality or a failed Cholesky factorisation asks for it. Entries that are not finite give
    NaN throughout. So does, while a CUDA graph is captured, a matrix that would need Householder.

    Raises:
        ValueError: unknown method, another shape. TypeError: another dtype.
        RuntimeError: "cholesky" or "cholesky_qr2", and a is too ill-conditioned for it;
            "cholesky_qr2" without the extension.
    """
    check_choice(method, METHODS, "method")
    _check(a)
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        capturing = is_capturing(a.device)
        if method == "cholesky_qr2" or (method == "auto" and prefers_cholesky_qr2(a)):
            found = cholesky_qr2(a, capturing)
        elif method == "cholesky" or (
            method == "auto" and a.shape[1] >= CHOLESKY_FROM and not capturing
        ):
            found = gram_schmidt(a)
            if found is not None and not is_orthonormal(found.q):
                found = first_order_pass(found)
        else:
            return _householder(a)
        if found is not None:
            return found
        if method != "auto" and bool(a.isfinite().all()):
            raise RuntimeError(
                f"method={method!r} cannot factorise this {tuple(a.shape)} matrix in {a.dtype}:"
                " it is too ill-conditioned; use method='auto' or 'householder'."
            )
        return _householder(a)


def _check(a: Tensor) -> None:
    if a.dim() != 2 or a.shape[0] < a.shape[1]:
        raise ValueError(
            f"orthogonal_factor needs a matrix (m, n) with m >= n, got {tuple(a.shape)}."
        )
    if a.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"orthogonal_factor needs float32 or float64, got {a.dtype}.")


def _householder(a: Tensor) -> Factors:
    # Some LAPACKs raise on NaN, and infinity times zero makes NaN in some entries only.
    finite = a.isfinite().all()
    q, r = torch.linalg.qr(torch.where(finite, a, 0.0))
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    q, r = (q * sign).contiguous(), (r * sign.unsqueeze(1)).contiguous()
    if len(r) >= _REFINE_FROM:
        u = half_upper(q)
        q, r = torch.addmm(q, q, u, alpha=-1), torch.addmm(r, u, r)
    return Factors(torch.where(finite, q, torch.nan), torch.where(finite, r, torch.nan))


def diagonal_inverses(r: Tensor) -> Tensor:
    """The inverses of the diagonal blocks of upper triangular r, stacked ``(n, block)``."""
    n, block = len(r), block_size(r)
    inverses = r.new_zeros(n, min(n, block))
    unit = torch.eye(min(n, block), dtype=r.dtype, device=r.device)
    for j in range(0, n, block):
        k = min(block, n - j)
        rows = torch.linalg.solve_triangular(r[j : j + k, j : j + k], unit[:k, :k], upper=True)
        inverses[j : j + k, :k] = rows
    return inverses


def pull_back(
    q: Tensor, r: Tensor, grad_q: Tensor | None, grad_r: Tensor | None = None
) -> Tensor | None:
    """The gradient of A from those of Q and R, in differentiable operations."""
    if grad_q is None and grad_r is None:
        return None
    m: Tensor | float = 0.0
    if grad_r is not None:
        m = r @ grad_r.triu().t()
    if grad_q is not None:
        m = m - grad_q.t() @ q
    assert isinstance(m, Tensor)
    y = q @ (m.tril() + m.tril(-1).t())
    if grad_q is not None:
        y = grad_q + y
    grad: Tensor = torch.linalg.solve_triangular(r.t(), y, upper=False, left=False)
    return grad


def pull_back_q(q: Tensor, r: Tensor, grad_q: Tensor, inverses: Tensor | None = None) -> Tensor:
    """``pull_back`` of a gradient of Q alone, not differentiable, with half the products."""
    m, n = q.shape
    if m != n or n == 0:
        found = pull_back(q, r, grad_q)
        assert found is not None
        return found
    x = torch.mm(q.t(), grad_q)
    z = x.sub_(x.t().contiguous()).tril_(-1)
    if inverses is None:
        inverses = diagonal_inverses(r)
    out, block = torch.empty_like(q), inverses.shape[1]
    # Z <- Z R^-T, Z lower triangular, from the last column panel to the first; then Q Z.
    for j in reversed(range(0, n, block)):
        e = min(j + block, n)
        if e < n:
            z[e:, j:e].addmm_(z[e:, e:], r[j:e, e:].t(), alpha=-1)
        z[j:, j:e] = z[j:, j:e] @ inverses[j:e, : e - j].t()
        torch.mm(q[:, j:], z[j:, j:e], out=out[:, j:e])
    return out


torch.library.define(
    "fastdeq::orthogonal_factor",
    "(Tensor raw, str method='auto', bool remember=False) -> (Tensor q, Tensor r)",
)
torch.library.define(
    "fastdeq::orthogonal_factor_backward", "(Tensor q, Tensor r, Tensor grad_q) -> Tensor"
)


@torch.library.impl("fastdeq::orthogonal_factor", "CompositeExplicitAutograd")
def _orthogonal_factor(
    raw: Tensor, method: str = "auto", remember: bool = False
) -> tuple[Tensor, Tensor]:
    """``remember``: a matrix that has not changed since is not factorised again ("auto" only)."""
    if not remember or method != "auto":
        return factors(raw, method)[:2]
    q, r, *_ = memory.factors(raw, factors)
    return q.clone(), r.clone()


@torch.library.register_fake("fastdeq::orthogonal_factor")
def _orthogonal_factor_fake(
    raw: Tensor, method: str = "auto", remember: bool = False
) -> tuple[Tensor, Tensor]:
    check_choice(method, METHODS, "method")
    _check(raw)
    m, n = raw.shape
    return raw.new_empty(m, n), raw.new_empty(n, n)


@torch.library.impl("fastdeq::orthogonal_factor_backward", "CompositeExplicitAutograd")
def _orthogonal_factor_backward(q: Tensor, r: Tensor, grad_q: Tensor) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return pull_back_q(q, r, grad_q)


@torch.library.register_fake("fastdeq::orthogonal_factor_backward")
def _orthogonal_factor_backward_fake(q: Tensor, r: Tensor, grad_q: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_q: Tensor | None, grad_r: Tensor | None) -> tuple[Any, ...]:
    q, r = ctx.saved_tensors
    if grad_r is None and grad_q is not None and not torch.is_grad_enabled():
        return torch.ops.fastdeq.orthogonal_factor_backward(q, r, grad_q), None, None
    with torch.autocast(q.device.type, enabled=False):
        return pull_back(q, r, grad_q, grad_r), None, None


torch.library.register_autograd(
    "fastdeq::orthogonal_factor", _backward, setup_context=_setup_context
)
