"""Cells with symmetric weights of a given spectral radius, for tests of what makes use of them."""

import torch
from engine_cases import Adjoint, Forward

from fastdeq.activations import ACTIVATIONS

MONOTONE = [name for name, phi in ACTIVATIONS.items() if phi.monotone]
IMPLEMENTATIONS = ("engine", "reference")


def symmetric_weight(size, radius, dtype=torch.float64):
    """Exactly symmetric, from the Gaussian orthogonal ensemble, of that spectral radius."""
    a = torch.randn(size, size, dtype=torch.float64)
    w = a + a.t()
    return (w * (radius / torch.linalg.eigvalsh(w).abs().max())).to(dtype)


def symmetric_cell(batch, size, radius, dtype=torch.float64, activation="tanh", start=None):
    c = torch.randn(batch, size, dtype=torch.float64).to(dtype)
    return Forward(symmetric_weight(size, radius, dtype), c, activation, start)


def adjoint_at(case, value, grad=None):
    """The adjoint problem of a forward one at a solution of it."""
    slope = ACTIVATIONS[case.activation].slope(case.pre(value)).to(case.weight.dtype)
    grad = torch.randn_like(case.injection) if grad is None else grad
    return Adjoint(case.weight, slope, grad)


def relative_residual(case, value):
    """(B,) of a forward problem, in float64."""
    z = value.double()
    f = case.step(z)
    return (f - z).norm(dim=1) / (f.norm(dim=1) + 1e-9)
