"""Block Gram-Schmidt by Cholesky factors: ``A = Q R``, ``R_ii > 0``, ``E = Q^T Q - I``.

A panel of columns is freed of what the panels before it span, then made orthonormal by the Cholesky
factor of its Gram matrix (n = one panel: CholeskyQR). All of it is products of matrices. A panel
loses about ``eps`` times ``eta = |A_j| |R_jj^-1|``, squared within the panel; where eta is large,
and only there, the panel goes through both steps again, as in CholeskyQR2 (Yamamoto et al., ETNA 44
(2015) 306) but at the cost of the panels that need it; twice is enough (Giraud et al., Numer. Math.
101 (2005) 87). Random probes of E measure the result.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: A panel with a larger eta is orthogonalised twice. At 1.5 every |E_ij| stayed below 1e-6 in
#: float32, for condition numbers of 1 to 1e6 and n of 128 to 1024; at 4 up to 1e-5 was seen.
_ETA = 1.5
_PROBES = 8


class Factors(NamedTuple):
    """``A = q r``; the inverses of r's diagonal blocks, stacked ``(n, block)``, where known."""

    q: Tensor
    r: Tensor
    inverses: Tensor | None = None


def block_size(a: Tensor) -> int:
    """How many columns make a panel."""
    # Smaller panels do less work, larger ones are fewer calls. Off the CPU calls are dearer.
    if a.device.type != "cpu":
        return 256
    return 64 if a.shape[1] <= 1024 else 128


def gram_schmidt(a: Tensor) -> Factors | None:
    """Block Gram-Schmidt in panels, or None where a panel is too ill-conditioned."""
    n, block = a.shape[1], block_size(a)
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


def _eta(inverse: Tensor, panel: Tensor) -> float:
    """``|A_j| |R_jj^-1|`` in Frobenius norms, per column: 1 where the panel is orthonormal."""
    product = torch.linalg.vector_norm(inverse) * torch.linalg.vector_norm(panel)
    return float(product) / len(inverse)


def _cholesky_step(y: Tensor, eye: Tensor) -> tuple[Tensor, Tensor] | None:
    """R and its inverse for a panel, or None where its Gram matrix is not positive definite."""
    r, info = torch.linalg.cholesky_ex(y.t() @ y, upper=True)
    if info.item():
        return None
    return r, torch.linalg.solve_triangular(r, eye, upper=True)


def half_upper(q: Tensor) -> Tensor:
    """U, ``I + U`` the Cholesky factor of ``I + E = Q^T Q`` to first order in E."""
    e = torch.mm(q.t(), q)
    e.diagonal().sub_(1)
    e.diagonal().div_(2)
    return e.triu_()


def first_order_pass(found: Factors) -> Factors | None:
    """Repairs a Q whose E is small, or None: what is left is of size ``|E|^2``."""
    u = half_upper(found.q)
    left = float(torch.linalg.vector_norm(u)) ** 2
    if not left < torch.finfo(u.dtype).eps:
        return None
    return Factors(
        torch.addmm(found.q, found.q, u, alpha=-1), torch.addmm(found.r, u, found.r), None
    )


def is_orthonormal(q: Tensor) -> bool:
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
