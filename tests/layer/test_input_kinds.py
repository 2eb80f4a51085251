"""Inputs and starts that are parameters or plain subclasses of Tensor: what comes out is plain."""

import pytest
import torch
from torch import Tensor, nn

from fastdeq import AffineCell, DEQLayer


class Labelled(torch.Tensor):
    """A subclass that only has a name of its own."""

    label = "x"


class Logged(torch.Tensor):
    """A subclass that watches functions."""

    calls = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls += 1
        return super().__torch_function__(function, types, args, kwargs or {})


KINDS = {
    "parameter": lambda t: nn.Parameter(t),
    "labelled": lambda t: t.as_subclass(Labelled),
    "logged": lambda t: t.as_subclass(Logged),
    "parameter of a subclass": lambda t: nn.Parameter(t.as_subclass(Labelled)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["auto", "reference"])
def layer(request):
    cell = AffineCell(5, 7, scale=0.5, dtype=torch.float64)
    return DEQLayer(cell, tol=1e-9, backend=request.param)


def is_plain(*tensors):
    return all(type(t) is Tensor for t in tensors)


def all_plain(solution):
    values = (solution.value, solution.status, solution.iterations, solution.residual)
    return is_plain(*values, *solution.rejects.values())


@every_kind
def test_input(layer, kind):
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = layer(x)
    z = layer(KINDS[kind](x))
    assert is_plain(z)
    assert torch.equal(z, expected)
    assert all_plain(layer.last_solution)
    z.sum().backward()
    assert all_plain(layer.last_adjoint_solution)
    x[1, 2] = torch.nan
    layer.options = DEQLayer(layer.cell, on_failure="ignore").options
    z = layer(KINDS[kind](x))
    assert is_plain(z)
    assert (z[1] == 0).all()
    assert all_plain(layer.last_solution)


@every_kind
def test_start(layer, kind):
    x, start = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    z = layer(x, z0=KINDS[kind](start))
    assert is_plain(z)
    assert torch.equal(z, layer(x, z0=start))
    assert all_plain(layer.last_solution)


@every_kind
def test_gradients_reach_what_was_given(layer, kind):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    given = KINDS[kind](x) if "parameter" not in kind else KINDS[kind](x.detach())
    layer(given).square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    layer(twin).square().sum().backward()
    grad = (x if x.grad is not None else given).grad
    torch.testing.assert_close(grad.as_subclass(Tensor), twin.grad)


@pytest.mark.parametrize("kind", ["labelled", "parameter of a subclass"])
def test_weights_of_a_subclass(kind):
    cell = AffineCell(5, 7, scale=0.5)
    for module in (cell.weight, cell.injection):
        module.weight = nn.Parameter(KINDS[kind](module.weight.detach()))
    x = torch.randn(3, 5)
    z = DEQLayer(cell)(x)
    assert is_plain(z, cell.recurrent_weight().detach(), cell.inject(x))
    z.sum().backward()
    assert all(p.grad is not None for p in cell.parameters())


def test_compiled(fresh_compiler):
    layer = DEQLayer(AffineCell(5, 7, scale=0.5))
    f = torch.compile(layer, backend="aot_eager")
    x = torch.randn(3, 5)
    for kind in ("parameter", "labelled"):
        z = f(KINDS[kind](x))
        assert is_plain(z)
        torch.testing.assert_close(z, layer(x))


@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
@pytest.mark.parametrize("features", [3, 128])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_default_scale_is_stable(weight, features, activation):
    cell = AffineCell(64, features, weight=weight, activation=activation)
    assert cell.weight.scale == 0.9
    layer = DEQLayer(cell, on_failure="raise", max_iter=500)
    layer(torch.randn(16, 64)).sum().backward()
