"""Layers of every kind around one affine map, and its iteration by hand, for gradients through
steps. Float64 throughout."""

import pytest
import torch
from gradient_cases import General, make_cell

from fastdeq import DEQLayer

#: A value of about 1 that went through at most 100 contracting steps; gradients sum over samples.
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}


class Pair(torch.nn.Module):
    """The state of an affine cell in two parts of other shapes."""

    def __init__(self, cell):
        super().__init__()
        self.inner = cell

    def initial_state(self, x):
        return x.new_zeros(len(x), 1), x.new_zeros(len(x), 1, self.inner.features - 1)

    def forward(self, z, x):
        f = self.inner(torch.cat([z[0], z[1][:, 0]], 1), x)
        return f[:, :1], f[:, None, 1:]


KINDS = {"fused": lambda cell: cell, "general": General, "pair": Pair}
every_kind = pytest.mark.parametrize("kind", KINDS)


def whole(z):
    """The state of any kind as rows."""
    return torch.cat([z[0], z[1][:, 0]], 1) if isinstance(z, tuple) else z


def problem(kind, *, scale=0.5, batch=4, **options):
    """A layer, its cell, and inputs for which samples need different numbers of steps."""
    cell = make_cell(scale=scale, n=3, d=4)
    numbers = torch.Generator().manual_seed(7)  # whatever the test: the counts depend on them
    with torch.no_grad():
        for p in cell.parameters():
            p.normal_(generator=numbers)
        cell.weight.weight.mul_(scale / torch.linalg.matrix_norm(cell.recurrent_weight(), 2))
    sizes = torch.logspace(-1, 1, batch, dtype=torch.float64)[:, None]
    x = torch.randn(batch, 3, dtype=torch.float64, generator=numbers) * sizes
    x.requires_grad_()
    return DEQLayer(KINDS[kind](cell), **options), cell, x


def by_hand(cell, x, counts, damping=1.0, tracked=None, start=None):
    """``counts[i]`` steps of sample i, by itself, the last ``tracked`` of them differentiated."""
    found = []
    for i, count in enumerate(counts):
        z = x.new_zeros(1, cell.features) if start is None else start[i : i + 1]
        for k in range(count):
            if tracked is not None and k == max(count - tracked, 0):
                z = z.detach()
            z = z + damping * (cell(z, x[i : i + 1]) - z)
        found.append(z)
    return torch.cat(found)


def gradients(z, cell, x):
    """Of a loss, for x and the cell's parameters."""
    z = whole(z)
    weights = torch.linspace(1, 2, z.numel(), dtype=z.dtype).view_as(z)
    inputs = [x, *cell.parameters()]
    return torch.autograd.grad((weights * z.sin()).sum(), inputs, retain_graph=True)


def same(found, expected, **tolerance):
    tolerance = tolerance or ROUNDING
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
