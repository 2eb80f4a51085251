"""The Arnoldi process and its least-squares problem, batched: one Krylov space per sample.

    V (B, m+1, n)  orthonormal basis
    H (B, m+1, m)  float64, upper Hessenberg, A V_m = V_{m+1} H
    beta = |r_0|   residual at the start of a cycle
    y              argmin |beta e_1 - H y|, and u = u_0 + V_m y

The residual norm inside a cycle costs O(m) per step: the left null vector l of H (l_0 = 1,
``l_{j+1} = -sum_i l_i H_ij / H_{j+1,j}``) gives ``|r_j| = beta / |l_{0..j}|``, because the residual
of the least-squares problem is the projection of beta e_1 on that vector.

Source: Y. Saad and M. Schultz, SIAM J. Sci. Stat. Comput. 7 (1986) 856.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Arnoldi:
    """Krylov spaces of up to ``dimension`` vectors for rows ``(B, n)``; all tensors are written to
    in place."""

    basis: Tensor  # (B, m+1, n)
    hessenberg: Tensor  # (B, m+1, m) float64
    null: Tensor  # (B, m+1) float64, the left null vector
    beta: Tensor  # (B,) float64
    step: Tensor  # (B,) int64: columns done in this cycle; -1: there is none
    start: Tensor  # (B, n): u_0 of the cycle
    used: int  # columns of the basis that any sample has used

    @classmethod
    def of(cls, point: Tensor, dimension: int) -> Arnoldi:
        batch, size = point.shape
        wide = torch.float64
        return cls(
            basis=point.new_zeros(batch, dimension + 1, size),
            hessenberg=point.new_zeros(batch, dimension + 1, dimension, dtype=wide),
            null=point.new_zeros(batch, dimension + 1, dtype=wide),
            beta=point.new_zeros(batch, dtype=wide),
            step=torch.full((batch,), -1, device=point.device),
            start=point.clone(),
            used=0,
        )

    @property
    def dimension(self) -> int:
        return int(self.basis.shape[1]) - 1

    def estimate(self) -> Tensor:
        """The residual norms ``(B,)`` of the least-squares problems."""
        length: Tensor = self.null.norm(dim=1)
        return self.beta / length

    def vectors(self) -> Tensor:
        """The newest basis vectors ``(B, n)``."""
        row = torch.arange(len(self.step), device=self.step.device)
        return self.basis[row, self.step.clamp(min=0, max=self.dimension)]

    def open(self, opening: Tensor, point: Tensor, residual: Tensor, norm: Tensor) -> None:
        """Starts a cycle at ``point`` for the samples ``opening`` ``(B,)`` bool."""
        r, length = residual[opening], norm[opening]
        self.basis[opening] = 0
        self.basis[opening, 0] = r / torch.where(length > 0, length, 1.0).unsqueeze(1)
        self.hessenberg[opening] = 0
        self.null[opening] = 0
        self.null[opening, 0] = 1
        self.beta[opening] = length.double()
        self.start[opening] = point[opening]
        self.step[opening] = 0

    def extend(self, w: Tensor) -> None:
        """Adds the column of ``w = A v`` ``(B, n)``, v the newest vectors; :meth:`open` overwrites
        it for samples without one."""
        rows = torch.arange(len(w), device=w.device)
        at = self.step.clamp(min=0, max=self.dimension - 1)
        basis = self.basis[:, : self.used + 1]  # columns beyond a sample's own step are zero
        column = w.new_zeros(len(w), self.used + 1)
        for _ in range(2):  # classical Gram-Schmidt twice: orthogonal to machine precision
            projection = torch.bmm(w.unsqueeze(1), basis.transpose(1, 2)).squeeze(1)
            w = w - torch.bmm(projection.unsqueeze(1), basis).squeeze(1)
            column = column + projection
        length = w.norm(dim=1)
        # A length at the rounding floor is an invariant subspace: the iterate is exact.
        floor = 10 * torch.finfo(w.dtype).eps * column.norm(dim=1)
        closed = length <= floor
        safe = torch.where(closed, 1.0, length)
        self.hessenberg[rows, : self.used + 1, at] = column.double()
        self.hessenberg[rows, at + 1, at] = torch.where(closed, 0.0, length).double()
        self.basis[rows, at + 1] = torch.where(closed, 0.0, 1.0).unsqueeze(1) * (w / safe[:, None])
        inner = (self.null[:, : self.used + 1] * column).sum(1)
        self.null[rows, at + 1] = torch.where(closed, torch.inf, -inner / safe)
        self.step += 1

    def minimise(self, leaving: Tensor) -> Tensor:
        """``u_0 + V y`` for the samples ``leaving`` ``(B,)`` bool, ``(L, n)``."""
        hessenberg, step = self.hessenberg[leaving], self.step[leaving]
        index = torch.arange(self.dimension, device=step.device)
        unused = index >= step.unsqueeze(1)
        # A unit subdiagonal in unused columns keeps the factor regular and their y at zero.
        hessenberg[:, index + 1, index] += unused
        q, r = torch.linalg.qr(hessenberg)
        rhs = q[:, 0, :] * self.beta[leaving].unsqueeze(1)
        diagonal = r.diagonal(dim1=1, dim2=2)
        singular = diagonal.abs() <= 1e-14 * diagonal.abs().amax(1, keepdim=True)
        rhs = torch.where(singular, 0.0, rhs)
        r = r + torch.diag_embed(torch.where(singular, 1.0 - diagonal, 0.0))
        y = torch.linalg.solve_triangular(r, rhs.unsqueeze(2), upper=True).squeeze(2)
        y = torch.where(unused, 0.0, y).to(self.basis.dtype)
        basis = self.basis[leaving][:, : self.dimension]
        return self.start[leaving] + torch.bmm(y.unsqueeze(1), basis).squeeze(1)
