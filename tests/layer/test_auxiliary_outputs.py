"""Auxiliary outputs: their values and gradients against the unrolled iteration, and their cost."""

import pytest
import torch
from torch import nn

from fastdeq import DEQLayer, fixed_point
from fastdeq.diagnostics import spectral_radius

F64 = torch.float64
TIGHT = {"tol": 1e-12, "max_iter": 300}


class Attention(nn.Module):
    """A cell that shows what it computed on the way, in a dict."""

    def __init__(self):
        super().__init__()
        w = torch.randn(4, 4, dtype=F64)
        self.w = nn.Parameter(0.6 * w / torch.linalg.matrix_norm(w, 2))
        self.calls = 0

    def forward(self, z, x, scale=1.0):
        self.calls += 1
        hidden = torch.tanh(z @ self.w + x)
        return scale * hidden, {"hidden": hidden, "energy": (z * hidden).sum(1), "name": "tanh"}


def unrolled(cell, x, **keywords):
    z = torch.zeros_like(x)
    for _ in range(150):
        z = cell(z, x, **keywords)[0]
    return z, cell(z, x, **keywords)[1]


@pytest.mark.parametrize("options", [{}, {"compact": True}, {"batch_dim": None}], ids=str)
def test_values_and_gradients_are_those_of_the_unrolled_iteration(options):
    cell = Attention()
    x = torch.randn(5, 4, dtype=F64, requires_grad=True)
    scale = torch.tensor(0.9, dtype=F64, requires_grad=True)
    layer = DEQLayer(cell, has_aux=True, **options, **TIGHT)
    z, aux = layer(x, scale=scale)
    expected, known = unrolled(cell, x, scale=scale)
    assert aux["name"] == "tanh"
    leaves = (cell.w, x, scale)

    def loss(z, aux):
        return z.pow(2).sum() + aux["hidden"].sin().sum() + aux["energy"].prod()

    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(aux["energy"], known["energy"], rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(loss(z, aux), leaves)
    for one, other in zip(found, torch.autograd.grad(loss(expected, known), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_gradcheck_in_first_and_second_order():
    w = 0.4 * torch.randn(3, 3, dtype=F64).requires_grad_()
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)

    def solved(w, x):
        def f(s):
            z = torch.tanh(s["z"] @ (w / 2) + x)
            return {"z": z}, (s["z"] * z, w.sum())

        (state, aux), _ = fixed_point(f, {"z": torch.zeros(2, 3, dtype=F64)}, has_aux=True, **TIGHT)
        return state["z"], *aux

    assert torch.autograd.gradcheck(solved, (w, x))
    assert torch.autograd.gradgradcheck(solved, (w, x), atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_it_costs_one_evaluation(grad):
    cell = Attention()
    x = torch.randn(5, 4, dtype=F64)
    counts = []
    with torch.set_grad_enabled(grad):
        for has_aux in (False, True):
            whole = cell if has_aux else (lambda z, x: cell(z, x)[0])
            layer = DEQLayer(whole, has_aux=has_aux)
            layer(x)  # with the look at samples
            cell.calls = 0
            result = layer(x)
            counts.append(cell.calls)
    z, aux = result
    assert counts[1] == counts[0] + 1
    assert aux["hidden"].requires_grad == grad
    torch.testing.assert_close(aux["energy"], (z * torch.tanh(z @ cell.w + x)).sum(1))


def test_the_caller_may_write_to_the_state():
    cell = Attention()
    x = torch.randn(5, 4, dtype=F64, requires_grad=True)
    layer = DEQLayer(cell, has_aux=True, **TIGHT)
    z, aux = layer(x)
    (expected,) = torch.autograd.grad(aux["energy"].sum(), x)
    z, aux = layer(x)
    z.zero_()
    torch.testing.assert_close(torch.autograd.grad(aux["energy"].sum(), x)[0], expected)


def test_diagnostics_of_a_layer_with_them():
    w = 0.5 * torch.eye(4, dtype=F64)
    x = torch.randn(3, 4, dtype=F64)
    layer = DEQLayer(lambda z, x: (z @ w + x, z), has_aux=True)
    for radius in (spectral_radius(layer, x), spectral_radius(layer, x, torch.zeros_like(x))):
        torch.testing.assert_close(
            radius.value, torch.full((3,), 0.5, dtype=F64), rtol=1e-3, atol=0
        )


def test_a_cell_that_returns_no_pair():
    x = torch.zeros(2, 4)
    for cell in (lambda z, x: z, lambda z, x: (z, z, z), lambda z, x: [z, z]):
        with pytest.raises(TypeError, match=r"returned .*has_aux=True it returns \(state, aux\)"):
            DEQLayer(cell, has_aux=True)(x)
    with pytest.raises(TypeError, match=r"returned \(Tensor, Tensor\) for a state Tensor"):
        DEQLayer(lambda z, x: (z, z))(x)
    with pytest.raises(ValueError, match="has_aux must be"):
        DEQLayer(lambda z, x: z, has_aux="yes")
    assert "has_aux=True" in repr(DEQLayer(lambda z, x: z, has_aux=True))
