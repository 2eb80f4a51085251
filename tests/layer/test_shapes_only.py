"""Fake tensors and the meta device go through all that a layer around a general cell has."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fastdeq import AffineCell, Anderson, DEQLayer, jacobian_penalty, trajectory

GRADIENTS = ("implicit", "one_step", "phantom", "truncated", "unrolled", "reversible")


@pytest.fixture(params=["fake", "meta"])
def device(request):
    fake = request.param == "fake"
    with FakeTensorMode() if fake else contextlib.nullcontext():
        yield "cpu" if fake else "meta"


class Cell(nn.Module):
    def __init__(self, device, step, start=None):
        super().__init__()
        self.linear = nn.Linear(6, 6, device=device)
        self.step = step
        if start is not None:
            self.initial_state = start

    def forward(self, z, x, **keywords):
        return self.step(self.linear, z, x, **keywords)


def plain(linear, z, x):
    return torch.tanh(linear(z) + x)


def shapes(layer, x, **keywords):
    """Of all outputs, after a backward pass, and the same without grad mode."""
    out = tree_leaves(layer(x, **keywords))
    sum(t.abs().sum() for t in out).backward()
    for p in layer.parameters():
        assert p.grad.shape == p.shape
    with torch.no_grad():
        again = tree_leaves(layer(x, **keywords))
    assert [t.shape for t in again] == [t.shape for t in out]
    return [tuple(t.shape) for t in out]


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_a_general_cell(device, gradient):
    layer = DEQLayer(Cell(device, plain), gradient=gradient)
    assert shapes(layer, torch.randn(5, 6, device=device)) == [(5, 6)]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
def test_gradients_of_an_affine_cell_with_leading_dimensions(device, weight, gradient):
    cell = AffineCell(6, 8, weight=weight, scale=0.5, device=device)
    layer = DEQLayer(cell, gradient=gradient)
    assert shapes(layer, torch.randn(2, 5, 6, device=device)) == [(2, 5, 8)]


def test_a_structure_of_parts_with_an_auxiliary_output(device):
    def step(linear, z, x):
        a = torch.tanh(linear(z["a"]) + x)
        return {"a": a, "b": (z["b"][0] + a.sum(1),)}, {"norm": a.norm()}

    def start(x):
        return {"a": torch.zeros_like(x), "b": (x.new_zeros(len(x)),)}

    layer = DEQLayer(Cell(device, step, start), has_aux=True)
    assert shapes(layer, torch.randn(5, 6, device=device)) == [(5, 6), (5,), ()]


def test_a_complex_state(device):
    def step(linear, z, x):
        return torch.complex(torch.tanh(linear(z.real) + x), torch.tanh(z.imag))

    def start(x):
        return torch.zeros(x.shape, dtype=torch.complex64, device=x.device)

    layer = DEQLayer(Cell(device, step, start))
    assert shapes(layer, torch.randn(5, 6, device=device)) == [(5, 6)]


def test_keyword_arguments(device):
    layer = DEQLayer(Cell(device, lambda linear, z, x, mask: plain(linear, z, x) * mask))
    mask = torch.ones(5, 6, device=device)
    assert shapes(layer, torch.randn(5, 6, device=device), mask=mask) == [(5, 6)]


@pytest.mark.parametrize(
    "options",
    [
        {"randomness": "same"},
        {"compact": True},
        {"precision": "mixed"},
        {"adjoint_limit": 4.0},
        {"batch_dim": (0, 1)},
        {"batch_dim": None},
        {"solver": "broyden", "adjoint": "bicgstab"},
        {"solver": "newton_krylov", "adjoint": "gmres"},
        {"solver": Anderson(kind="I"), "adjoint": "heavy_ball"},
    ],
    ids=lambda o: "-".join(o),
)
def test_options(device, options):
    layer = DEQLayer(Cell(device, plain), **options)
    assert shapes(layer, torch.randn(5, 2, 6, device=device)) == [(5, 2, 6)]


def test_states_along_a_solve_and_a_penalty(device):
    cell, x = Cell(device, plain), torch.randn(5, 6, device=device)
    states = trajectory(DEQLayer(cell), x, states=3)
    assert [tuple(t.shape) for t in states] == [(5, 6)] * 3
    (states[-1].sum() + jacobian_penalty(cell, states[-1], x).sum()).backward()
    assert cell.linear.weight.grad.shape == (6, 6)
