"""Jacobians of known spectra, and cells that have them."""

from __future__ import annotations

import math

import pytest
import torch

from fastdeq import Symmetric

N = 48
F64 = torch.float64
REFERENCE = 1e-14  # relative rounding of the dense decompositions themselves, in float64


class Linear(torch.nn.Module):
    """``z -> J z`` with a matrix of its own for each sample: J ``(B, n, n)``."""

    def __init__(self, matrices):
        super().__init__()
        self.matrices = torch.nn.Parameter(matrices)

    def forward(self, z, x):
        return torch.einsum("bij,bj->bi", self.matrices, z) + x


def at_zero(measure, matrices, **options):
    zero = matrices.new_zeros(matrices.shape[:2])
    return measure(Linear(matrices), zero, zero, **options)


def haar(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=F64))[0]


def rotated(eigenvalues):
    """Symmetric, with the eigenvalues of a list."""
    q = haar(len(eigenvalues))
    return q @ torch.diag(torch.as_tensor(eigenvalues, dtype=F64)) @ q.T


def plane(angle, modulus, rest):
    """Normal: one complex pair, and the ``rest`` smaller in modulus."""
    c, s = modulus * math.cos(angle), modulus * math.sin(angle)
    block = torch.tensor([[c, -s], [s, c]], dtype=F64)
    q = haar(len(rest) + 2)
    return q @ torch.block_diag(block, torch.diag(torch.as_tensor(rest, dtype=F64))) @ q.T


def uniform(n, low, high):
    return (low + (high - low) * torch.rand(n, dtype=F64)).tolist()


SYMMETRIC = {
    "symmetric": lambda: Symmetric(N, 0.9, dtype=F64)().detach(),
    "diagonal with a gap": lambda: torch.diag(torch.tensor([2.0, *uniform(N - 1, -1, 1)])).to(F64),
    "negative end": lambda: rotated([-2.0, *uniform(N - 1, -1, 1.9)]),
    "clustered": lambda: rotated([*uniform(6, 0.99999, 1), *uniform(N - 6, 0, 0.5)]),
    "near the end": lambda: rotated([1.0, 0.9999, 0.9998, *uniform(N - 3, 0, 0.9)]),
    "low rank": lambda: rotated([1.0, -0.5, 0.3] + [0.0] * (N - 3)),
    "identity": lambda: 0.7 * torch.eye(N, dtype=F64),
    "zero": lambda: torch.zeros(N, N, dtype=F64),
    "one by one": lambda: torch.tensor([[-0.6]], dtype=F64),
    "tiny": lambda: 1e-30 * rotated(uniform(N, -1, 1)),
}
NORMAL = SYMMETRIC | {
    "orthogonal": lambda: 0.9 * haar(N),
    "complex pair": lambda: plane(2.0, 1.0, uniform(N - 2, -0.99, 0.99)),
    "imaginary pair": lambda: plane(math.pi / 2, 1.0, uniform(N - 2, -0.9, 0.9)),
}
SHIFT = torch.diag(torch.ones(7, dtype=F64), 1)
OTHER = {
    "dense": lambda: torch.randn(N, N, dtype=F64) / math.sqrt(N),
    "strictly triangular": lambda: torch.randn(N, N, dtype=F64).triu(1) / math.sqrt(N),
    "product of rank 3": lambda: torch.randn(N, 3, dtype=F64) @ torch.randn(3, N, dtype=F64) / N,
    "nilpotent": lambda: SHIFT,
    "skewed": lambda: (
        torch.diag(torch.linspace(0.1, 1, N, dtype=F64)) + 3 * SHIFT.new_ones(N, N).triu(1) / N
    ),
}
precisions = pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
# Too few to settle, about enough, and as many as make the space closed.
budgets = pytest.mark.parametrize("max_products", [6, 20, N])


def made(cases, name, dtype):
    """The matrix in ``dtype``, and in float64 what that rounding made of it."""
    matrix = cases[name]().to(dtype)
    return matrix.unsqueeze(0), matrix.to(F64)
