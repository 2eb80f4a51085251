"""Layers of every kind for transforms, in float64, and what counts as equal."""

import torch
from torch import nn

from fastdeq import AffineCell, DEQLayer

F64 = torch.float64
OPTIONS = {"tol": 1e-12, "max_iter": 300}
BOUND = 1e-9


class Cell(nn.Module):
    """tanh of a linear map and the input; a tuple of two parts where ``pair``."""

    def __init__(self, size, pair=False):
        super().__init__()
        self.linear = nn.Linear(size, size, dtype=F64)
        nn.init.orthogonal_(self.linear.weight, 0.6)
        self.pair = pair

    def initial_state(self, x):
        return (torch.zeros_like(x), torch.zeros_like(x)) if self.pair else torch.zeros_like(x)

    def forward(self, z, x):
        if not self.pair:
            return torch.tanh(self.linear(z) + x)
        return torch.tanh(self.linear(z[1]) + x), torch.sin(0.5 * z[0] + x)


def layer_of(kind, **options):
    if kind in ("general", "pair"):
        return DEQLayer(Cell(5, kind == "pair"), **OPTIONS, **options)
    cell = AffineCell(3, 5, scale=0.6, weight=kind, dtype=F64)
    return DEQLayer(cell, **OPTIONS, **options)


def whole(layer):
    """The layer's state as one tensor."""

    def run(x, **kwargs):
        z = layer(x, **kwargs)
        return torch.cat(z, 1) if isinstance(z, tuple) else z

    return run


def input_for(layer, batch=3):
    return torch.randn(batch, 5 if isinstance(layer.cell, Cell) else 3, dtype=F64)


def close(a, b):
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    assert float((a - b).norm()) <= BOUND * float(b.norm())
