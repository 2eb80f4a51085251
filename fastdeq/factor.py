"""The orthogonal factor of a matrix, and its gradient, as operators: ``A = Q R``, ``R_ii > 0``.

    A (m, n), m >= n    Q (m, n), Q^T Q = I    R (n, n) upper triangular    E = Q^T Q - I

With a positive diagonal of R both factors are unique and smooth wherever A has full rank.

*Householder*: ``torch.linalg.qr``, signs and, for large A, a first-order pass: ``Q (I - U)`` and
``(I + U) R`` with ``U = triu(E, 1) + diag(E) / 2`` leave ``|E|^2`` of ``|E|``. Any A, of any
rank.

*Cholesky*: block Gram-Schmidt. A panel of columns is freed of what the panels before it span, then
made orthonormal by the Cholesky factor of its Gram matrix (n = one panel: CholeskyQR). All of it
is products of matrices. A panel loses about ``eps`` times ``eta = |A_j| |R_jj^-1|``, squared within
the panel; where eta is large, and only there, the panel goes through both steps again, as in
CholeskyQR2 (Yamamoto et al., ETNA 44 (2015) 306) but at the cost of the panels that need it; twice
is enough (Giraud et al., Numer. Math. 101 (2005) 87). Random probes of E measure the result.

Gradient (Walter and Lehmann, arXiv:1009.6112; Roberts and Roberts, arXiv:2009.10071), which reuses
R: ``dA = (dQ + Q copyltu(M)) R^-T``, ``M = R dR^T - dQ^T Q``, copyltu(M) the symmetric matrix with
the lower triangle of M. For square Q without dR it is ``Q tril(X - X^T, -1) R^-T``,
``X = Q^T dQ``: two of its three products are with triangular matrices.

Operations for m = n, in products of n x n matrices (2 n^3): Householder QR 4/3, Cholesky 9/8 (8
panels), the gradient 2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .choices import check_choice

METHODS = ("auto", "householder", "cholesky")
#: The least number of columns at which Gram-Schmidt beats LAPACK on a CPU (two Zen 4 cores).
CHOLESKY_FROM = 160
#: A panel with a larger eta is orthogonalised twice. At 1.5 every |E_ij| stayed below 1e-6 in
#: float32, for condition numbers of 1 to 1e6 and n of 128 to 1024; at 4 up to 1e-5 was seen.
_ETA = 1.5
#: LAPACK's own Q in float32 has errors near 1e-6 from about twice this many columns on.
_REFINE_FROM = 129
_PROBES = 8


class Factors(NamedTuple):
    """``A = q r``; the inverses of r's diagonal blocks, stacked ``(n, block)``, where known."""

    q: Tensor
    r: Tensor
    inverses: Tensor | None = None


def _block(a: Tensor) -> int:
    # Smaller panels do less work, larger ones are fewer calls. Off the CPU calls are dearer.
    if a.device.type != "cpu":
        return 256
    return 64 if a.shape[1] <= 1024 else 128


def factors(a: Tensor, method: str = "auto") -> Factors:
    """Q and R of ``a`` ``(m, n)``, float32 or float64, ``m >= n``, without a gradient.

    "auto" is the Cholesky form from ``CHOLESKY_FROM`` columns on, and Householder below that and
    wherever the measured orthogonality or a failed Cholesky factorisation asks for it. Entries
    that are not finite give NaN throughout.

    Raises:
        ValueError: unknown method, another shape. TypeError: another dtype.
        RuntimeError: "cholesky", and a is too ill-conditioned for it.
    """
    check_choice(method, METHODS, "method")
    _check(a)
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        if method == "cholesky" or (method == "auto" and a.shape[1] >= CHOLESKY_FROM):
            found = _gram_schmidt(a)
            if found is not None and not _is_orthonormal(found.q):
                found = _first_order_pass(found)
            if found is not None:
                return found
            if method == "cholesky" and bool(a.isfinite().all()):
                raise RuntimeError(
                    f"method='cholesky' cannot factorise this {tuple(a.shape)} matrix in {a.dtype}:"
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
        u = _half_upper(q)
        q, r = torch.addmm(q, q, u, alpha=-1), torch.addmm(r, u, r)
    return Factors(torch.where(finite, q, torch.nan), torch.where(finite, r, torch.nan))


def _half_upper(q: Tensor) -> Tensor:
    """U, ``I + U`` the Cholesky factor of ``I + E = Q^T Q`` to first order in E."""
    e = torch.mm(q.t(), q)
    e.diagonal().sub_(1)
    e.diagonal().div_(2)
    return e.triu_()


def _first_order_pass(found: Factors) -> Factors | None:
    """Repairs a Q whose E is small, or None: what is left is of size ``|E|^2``."""
    u = _half_upper(found.q)
    left = float(torch.linalg.vector_norm(u)) ** 2
    if not left < torch.finfo(u.dtype).eps:
        return None
    return Factors(
        torch.addmm(found.q, found.q, u, alpha=-1), torch.addmm(found.r, u, found.r), None
    )


def _is_orthonormal(q: Tensor) -> bool:
    """Whether ``|E|_F`` is that of rounding errors, by its action on a few random vectors.

    Rounding leaves ``|E|_F`` of 0.1 to 0.35 eps n. A few vectors see any E spread over many
    columns; one concentrated in few columns has a large eta there, and was treated.
    """
    n = q.shape[1]
    generator = torch.Generator().manual_seed(0)
    signs = torch.empty(_PROBES, n, dtype=q.dtype).bernoulli_(generator=generator)
    v = signs.mul_(2).sub_(1).to(q.device)
    e = torch.addmm(v, v @ q.t(), q, beta=-1)  # rows: a product with columns takes thrice as long
    norm = float(torch.linalg.vector_norm(e)) / math.sqrt(_PROBES)  # E|Ev|^2 = |E|_F^2
    return norm <= 0.5 * torch.finfo(q.dtype).eps * (n + 16)


def _cholesky_step(y: Tensor, eye: Tensor) -> tuple[Tensor, Tensor] | None:
    """R and its inverse for a panel, or None where its Gram matrix is not positive definite."""
    r, info = torch.linalg.cholesky_ex(y.t() @ y, upper=True)
    if info.item():
        return None
    return r, torch.linalg.solve_triangular(r, eye, upper=True)


def _eta(inverse: Tensor, panel: Tensor) -> float:
    """``|A_j| |R_jj^-1|`` in Frobenius norms, per column: 1 where the panel is orthonormal."""
    product = torch.linalg.vector_norm(inverse) * torch.linalg.vector_norm(panel)
    return float(product) / len(inverse)


def _gram_schmidt(a: Tensor) -> Factors | None:
    """Block Gram-Schmidt in panels, or None where a panel is too ill-conditioned."""
    n, block = a.shape[1], _block(a)
    q, r = torch.empty_like(a, memory_format=torch.contiguous_format), a.new_zeros(n, n)
    inverses = a.new_zeros(n, min(n, block))
    unit = torch.eye(min(n, block), dtype=a.dtype, device=a.device)
    for j in range(0, n, block):
        e = min(j + block, n)
        panel, done, eye = a[:, j:e], q[:, :j], unit[: e - j, : e - j]
        y = torch.addmm(panel, done, r[:j, j:e], alpha=-1) if j else panel
        step = _cholesky_step(y, eye)
        if step is None:
            return None
        r_jj, inverse = step
        qj = y @ inverse
        # Not below _ETA for NaN either, which then fails the second step.
        if not _eta(inverse, panel) < _ETA:
            if j:
                rest = done.t() @ qj
                qj = torch.addmm(qj, done, rest, alpha=-1)
                r[:j, j:e].addmm_(rest, r_jj)
            again = _cholesky_step(qj, eye)
            if again is None or not _eta(again[1], qj) < _ETA:
                return None
            qj, inverse, r_jj = qj @ again[1], inverse @ again[1], again[0] @ r_jj
        q[:, j:e], r[j:e, j:e], inverses[j:e, : e - j] = qj, r_jj, inverse
        if e < n:
            torch.mm(qj.t(), a[:, e:], out=r[j:e, e:])
    return Factors(q, r, inverses)


def diagonal_inverses(r: Tensor) -> Tensor:
    """The inverses of the diagonal blocks of upper triangular r, stacked ``(n, block)``."""
    n, block = len(r), _block(r)
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
    "fastdeq::orthogonal_factor", "(Tensor raw, str method='auto') -> (Tensor q, Tensor r)"
)
torch.library.define(
    "fastdeq::orthogonal_factor_backward", "(Tensor q, Tensor r, Tensor grad_q) -> Tensor"
)


@torch.library.impl("fastdeq::orthogonal_factor", "CompositeExplicitAutograd")
def _orthogonal_factor(raw: Tensor, method: str = "auto") -> tuple[Tensor, Tensor]:
    return factors(raw, method)[:2]


@torch.library.register_fake("fastdeq::orthogonal_factor")
def _orthogonal_factor_fake(raw: Tensor, method: str = "auto") -> tuple[Tensor, Tensor]:
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
        return torch.ops.fastdeq.orthogonal_factor_backward(q, r, grad_q), None
    with torch.autocast(q.device.type, enabled=False):
        return pull_back(q, r, grad_q, grad_r), None


torch.library.register_autograd(
    "fastdeq::orthogonal_factor", _backward, setup_context=_setup_context
)
