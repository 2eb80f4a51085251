"""Small layers, fused and general, for tests of what layers do whatever the cell is."""

import pytest
import torch

from fastdeq import AffineCell, Anderson, Broyden, NewtonKrylov, Picard

SOLVERS = [Picard(), Anderson(), Anderson(window=1), Broyden(), Broyden(memory=1)]
SOLVERS += [Anderson(kind="I"), NewtonKrylov()]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


class Residual(torch.nn.Module):
    """A general cell, contracting, row by row."""

    def __init__(self, n=6):
        super().__init__()
        self.linear = torch.nn.Linear(n, n)
        torch.nn.init.orthogonal_(self.linear.weight, 0.5)

    def forward(self, z, x):
        return torch.tanh(self.linear(z)) + x


def affine(n=6, d=6, **options):
    return AffineCell(n, d, activation="tanh", scale=options.pop("scale", 0.7), **options)
