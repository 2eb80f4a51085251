"""Cells and solves for the tests of ``compact``."""

import torch
from torch import nn

from fastdeq import DEQLayer

DIM = 6


def data(batch, slow=(), dtype=torch.float64, seed=0):
    """x, and a gain per sample: 0.3, and 0.95 for slow ones."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, DIM, generator=g, dtype=dtype)
    gain = torch.full((batch, 1), 0.3, dtype=dtype)
    gain[list(slow)] = 0.95
    return x, gain


class Cell(nn.Module):
    """tanh(gain A z + x), A orthogonal, which counts the samples of its calls."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        q, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=g, dtype=dtype))
        self.a = nn.Parameter(q)
        self.calls = []

    def forward(self, z, x, gain):
        self.calls.append(len(z))
        return torch.tanh(gain * (z @ self.a.t()) + x)


def solved(cell, x, *context, **options):
    """z, gradients of x and A, and both solutions."""
    options = {"tol": 1e-10, "max_iter": 500, **options}
    layer = DEQLayer(cell, **options)
    x = x.clone().requires_grad_()
    z = layer(x, *context)
    weights = torch.linspace(1, 2, z.numel(), dtype=z.dtype).view_as(z)
    grads = torch.autograd.grad((weights * z).sum(), [x, *cell.parameters()])
    return z.detach(), grads, layer.last_solution, layer.last_adjoint_solution


def assert_same(found, expected, atol=1e-8):
    for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=atol)


class Biased(Cell):
    """With a bias that all samples share."""

    def forward(self, z, x, gain, bias):
        return super().forward(z, x + bias, gain)
