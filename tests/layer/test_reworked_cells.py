"""Cells that other tools have reworked: quantised, pruned, with low-rank updates, in channels_last.
Each against the same cell unrolled."""

import warnings

import pytest
import torch
from gradient_cases import FAMILIES, unrolled
from torch import nn
from torch.nn.utils import parametrize, prune

from fastdeq import AffineCell, DEQLayer

SIZE = 8
TIGHT = {"tol": 1e-12, "max_iter": 300}


class Perceptron(nn.Module):
    features = SIZE

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.first, self.second = (nn.Linear(SIZE, SIZE, dtype=dtype) for _ in range(2))
        with torch.no_grad():
            for linear in (self.first, self.second):
                linear.weight.mul_(0.8)

    def forward(self, z, x):
        return torch.tanh(self.second(torch.tanh(self.first(z))) + x)


def affine(weight):
    return AffineCell(SIZE, SIZE, weight=weight, scale=0.6, dtype=torch.float64)


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def check(layer, exact=unrolled, x=None):
    """State and gradients of two steps of training.

    The map contracts by 0.8 or better, so residuals of 1e-12 leave errors of 5e-12, and 200 steps
    1e-19.
    """
    for _ in range(2):
        x = torch.randn(4, SIZE, dtype=torch.float64) if x is None else x.detach()
        x.requires_grad_()
        wanted = [x, *trainable(layer)]
        z, reference = layer(x), exact(layer.cell, x)
        torch.testing.assert_close(z, reference, rtol=1e-9, atol=1e-10)
        ours, theirs = (torch.autograd.grad(t.square().sum(), wanted) for t in (z, reference))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
        with torch.no_grad():
            for p, g in zip(wanted[1:], ours[1:], strict=True):
                p.sub_(0.01 * g)


def quantised(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear})


@pytest.mark.parametrize("compact", [False, True])
def test_a_quantised_general_cell(compact):
    """Activations are rounded to 8 bits of their range, here [-1, 1]: iterates move by 1 / 127 in
    each of 8 numbers of size about 1, at the most; the tolerance has to be above that."""
    layer = quantised(DEQLayer(Perceptron(torch.float32), tol=3e-2, compact=compact))
    assert type(layer.cell.first) is not nn.Linear
    x = torch.randn(4, SIZE)
    z = layer(x)
    assert layer.last_solution.converged.all()
    reference = unrolled(layer.cell, x, 50)
    # Contracts by 0.5 or better: twice the residual.
    assert ((z - reference).norm(dim=1) <= 2 * 4e-2 * reference.norm(dim=1)).all()
    assert not z.requires_grad


@pytest.mark.parametrize("weight", FAMILIES)
def test_a_quantised_injection(weight):
    """It is evaluated once, so only its own rounding is in the result; W is trained as before."""
    layer = DEQLayer(AffineCell(SIZE, SIZE, weight=weight, scale=0.6), tol=1e-5)
    layer = quantised(layer)
    assert type(layer.cell.injection) is not nn.Linear
    x = torch.randn(4, SIZE)
    z = layer(x)
    assert layer.last_solution.path == "fused"
    reference = unrolled(layer.cell, x)
    torch.testing.assert_close(z, reference, rtol=1e-4, atol=1e-4)
    wanted = list(layer.cell.weight.parameters())
    ours, theirs = (torch.autograd.grad(t.square().sum(), wanted) for t in (z, reference))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_pruned_general_cell():
    cell = Perceptron()
    prune.l1_unstructured(cell.first, "weight", 0.5)
    prune.random_structured(cell.second, "weight", 0.25, dim=0)
    layer = DEQLayer(cell, **TIGHT)
    check(layer)
    prune.remove(cell.first, "weight")
    check(layer)


@pytest.mark.parametrize("weight", FAMILIES)
@pytest.mark.parametrize("part", ["weight", "injection"])
def test_a_pruned_affine_cell(weight, part):
    cell = affine(weight)
    module = getattr(cell, part)
    prune.l1_unstructured(module, "weight", 0.5)
    layer = DEQLayer(cell, **TIGHT)
    check(layer)
    assert layer.last_solution.path == "fused"
    prune.remove(module, "weight")
    check(layer)


class LowRankUpdate(nn.Module):
    """A trained update of a matrix that is kept."""

    def __init__(self, rank=2):
        super().__init__()
        self.down, self.up = (
            nn.Parameter(0.1 * torch.randn(rank, SIZE, dtype=torch.float64)) for _ in range(2)
        )

    def forward(self, weight):
        return weight + self.up.t() @ self.down


class Adapted(nn.Module):
    """The same beside an ``nn.Linear`` that is kept."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.update = linear.requires_grad_(False), LowRankUpdate()

    def forward(self, x):
        return self.linear(x) + x @ self.update.down.t() @ self.update.up


def test_low_rank_updates_of_a_general_cell():
    cell = Perceptron()
    cell.first, cell.second = Adapted(cell.first), Adapted(cell.second)
    layer = DEQLayer(cell, **TIGHT)
    assert len(trainable(layer)) == 4
    check(layer)


@pytest.mark.parametrize("weight", FAMILIES)
def test_low_rank_updates_of_an_affine_cell(weight):
    cell = affine(weight).requires_grad_(False)
    cell.injection = Adapted(cell.injection)
    parametrize.register_parametrization(cell.weight, "weight", LowRankUpdate())
    layer = DEQLayer(cell, **TIGHT)
    assert len(trainable(layer)) == 4
    check(layer)
    assert layer.last_solution.path == "fused"


@pytest.mark.parametrize("compact", [False, True])
def test_a_cell_in_channels_last(compact):
    """It sees states in its format, and returns them so."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(4, 4, 3, padding=1).double()

        def forward(self, z, x):
            return torch.tanh(0.4 * self.mix(z) + x)

    def exact(cell, x):
        z = torch.zeros_like(x)
        for _ in range(150):
            z = cell(z, x)
        return z

    layout = torch.channels_last
    cell, formats = Block().to(memory_format=layout), []
    layer = DEQLayer(cell, compact=compact, **TIGHT)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64).to(memory_format=layout)
    check(layer, exact, x)
    cell.register_forward_hook(
        lambda _, given, value: formats.append(given[0].is_contiguous(memory_format=layout))
    )
    z = layer(x.detach())
    assert z.is_contiguous(memory_format=layout)
    assert formats
    assert all(formats)
