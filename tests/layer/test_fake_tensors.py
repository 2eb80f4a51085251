"""Shapes without numbers: fake and meta tensors go through a layer, and nothing reads them."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastdeq import AffineCell, DEQLayer


@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
@pytest.mark.parametrize("on_failure", ["warn", "raise", "ignore"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_fake_layer_gives_shapes(weight, on_failure, dtype):
    with FakeTensorMode():
        cell = AffineCell(3, 70, scale=0.9, weight=weight, dtype=dtype)
        layer = DEQLayer(cell, on_failure=on_failure)
        x = torch.randn(5, 3, dtype=dtype, requires_grad=True)
        z = layer(x)
        assert (z.shape, z.dtype) == ((5, 70), dtype)
        assert layer.last_solution.status.shape == (5,)
        assert "5 samples" in repr(layer.last_solution)
        z.sum().backward()
        assert x.grad.shape == x.shape
        assert layer(x.detach(), z0=torch.zeros(5, 70, dtype=dtype)).shape == (5, 70)
        with torch.no_grad():
            assert layer(x).shape == (5, 70)


def test_a_real_layer_takes_fake_input():
    layer = DEQLayer(AffineCell(3, 8, scale=0.9))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(torch.randn(4, 3))).shape == (4, 8)
    layer(torch.randn(4, 3))  # and real input afterwards
    assert layer.last_solution.converged.all()


@pytest.mark.parametrize("weight", ["dense", "symmetric"])
def test_export(weight):
    layer = DEQLayer(AffineCell(3, 8, scale=0.7, weight=weight)).eval()
    x = torch.randn(4, 3)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("strict", [True, False])
def test_export_without_gradients(strict):
    layer = DEQLayer(AffineCell(3, 8, scale=0.7)).requires_grad_(False)
    x = torch.randn(4, 3)
    program = torch.export.export(layer, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
def test_a_fake_general_cell_gives_shapes(gradient):
    with FakeTensorMode():
        linear = torch.nn.Linear(6, 6)
        layer = DEQLayer(lambda z, x: torch.tanh(linear(z) + x), gradient=gradient)
        x = torch.randn(5, 6, requires_grad=True)
        z = layer(x)
        assert z.shape == (5, 6)
        z.sum().backward()
        assert linear.weight.grad.shape == (6, 6)
