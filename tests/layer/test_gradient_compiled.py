"""Gradients through steps under torch.compile, autocast and fake tensors."""

import pytest
import torch

from fastdeq import AffineCell, DEQLayer, Unrolled

METHODS = ["phantom", "truncated", "unrolled", "reversible", Unrolled(checkpoint=True)]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)


def results(layer, x, cell):
    z = layer(x)
    return z.detach(), *torch.autograd.grad(z.square().sum(), list(cell.parameters()))


@every_method
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_as_eager(method):
    cell = AffineCell(3, 8, scale=0.5)
    layer, x = DEQLayer(cell, gradient=method), torch.randn(5, 3)
    expected = results(layer, x, cell)
    # The count of phantom steps is known to the compiler; that of a solve ends its graph.
    compiled = torch.compile(layer, fullgraph=method == "phantom", backend="aot_eager")
    for a, b in zip(results(compiled, x, cell), expected, strict=True):
        torch.testing.assert_close(a, b)


@every_method
def test_autocast_leaves_an_affine_solve_in_float32(method):
    cell = AffineCell(3, 8, scale=0.5)
    layer, x = DEQLayer(cell, gradient=method, tol=1e-3), torch.randn(5, 3)
    expected = results(layer, x, cell)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
    found = z.detach(), *torch.autograd.grad(z.square().sum(), list(cell.parameters()))
    # The injection is made in bfloat16, and gradients go back through it.
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05 * float(b.abs().max()))


@every_method
@pytest.mark.parametrize("kind", ["fused", "general"])
def test_shapes_without_numbers(method, kind):
    with torch.device("meta"):
        cell = AffineCell(4, 4, scale=0.5)
    layer = DEQLayer(cell if kind == "fused" else lambda z, x: cell(z, x), gradient=method)
    x = torch.randn(5, 4, device="meta", requires_grad=True)
    z = layer(x)
    z.sum().backward()
    assert z.shape == x.grad.shape == (5, 4)
    with torch.no_grad():
        assert layer(x).shape == (5, 4)
