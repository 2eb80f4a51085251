"""Cells in float64 for tests of gradients, and one that hides from the fused path."""

import torch

from fastdeq import ACTIVATIONS, AffineCell

TIGHT = {"tol": 1e-12, "max_iter": 400}
SMOOTH = [a for a in ACTIVATIONS if a not in ("relu", "leaky_relu", "hardtanh")]
FAMILIES = ["dense", "orthogonal", "symmetric"]


def make_cell(activation="tanh", weight="dense", scale=0.6, n=3, d=3):
    return AffineCell(n, d, activation=activation, weight=weight, scale=scale, dtype=torch.float64)


def parameters_of(cell):
    """x-independent inputs for gradcheck: fresh leaves in place of the cell's parameters."""
    names, values = zip(*cell.named_parameters(), strict=True)
    leaves = tuple(v.detach().clone().requires_grad_() for v in values)
    return names, leaves


def as_function(layer, names):
    """The layer as a function of x and its parameters' values."""

    def run(x, *values):
        arguments = {f"cell.{n}": v for n, v in zip(names, values, strict=True)}
        return torch.func.functional_call(layer, arguments, (x,))

    return run


class General(torch.nn.Module):
    """Hides an AffineCell from the fused path: the general one must agree with it."""

    def __init__(self, cell):
        super().__init__()
        self.inner = cell

    def initial_state(self, x):
        return x.new_zeros(len(x), self.inner.features)

    def forward(self, z, x):
        return self.inner(z, x)


def unrolled(cell, x, steps=200):
    z = x.new_zeros(len(x), cell.features)
    for _ in range(steps):
        z = cell(z, x)
    return z
