"""What cells may do under ``torch.func``, and what is refused."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from transform_cases import F64, OPTIONS, Cell, close, input_for, layer_of

from fastdeq import DEQLayer, Unrolled


@pytest.mark.parametrize("kind", ["dense", "symmetric", "orthogonal", "general"])
@pytest.mark.parametrize("first", ["grad", "vmap", "jvp"])
def test_the_first_call_of_a_layer_may_be_transformed(kind, first):
    layer, other = layer_of(kind), None
    x = input_for(layer)
    run = {
        "grad": lambda: grad(lambda x: layer(x).sum())(x),
        "vmap": lambda: vmap(lambda a: layer(a[None]).sum())(x),
        "jvp": lambda: jvp(lambda x: layer(x).sum(), (x,), (torch.ones_like(x),))[1],
    }[first]
    found = run()
    other = run()
    close(found, other)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5, dtype=F64)
        self.table = nn.Embedding(7, 5, dtype=F64)

    def forward(self, z, x, mask, index):
        value = torch.tanh(0.3 * self.linear(z)).masked_fill(mask, 0)
        return value + x + 0.1 * self.table(index)


def test_masks_and_indices():
    layer = DEQLayer(Masked(), **OPTIONS)
    x, mask, index = torch.randn(4, 5, dtype=F64), torch.rand(4, 5) > 0.5, torch.arange(4)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(leaf, mask, index).square().sum(), leaf)

    def loss(x, mask, index):
        return layer(x, mask, index).square().sum()

    close(grad(loss)(x, mask, index), expected)
    close(vmap(grad(lambda *one: loss(*[t[None] for t in one])))(x, mask, index), expected)

    def of_signs(x):
        return layer(x, x > 0, index).square().sum()

    close(grad(of_signs)(x), jacfwd(of_signs)(x))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def of_parameters(p):
        return functional_call(layer, p, (x, mask, index)).square().sum()

    expected = torch.autograd.grad(loss(x, mask, index), list(layer.parameters()))
    for got, right in zip(jacrev(of_parameters)(parameters).values(), expected, strict=True):
        close(got, right)


def hidden_by_script(z, x):
    return scripted(z, x)


@torch.jit.script
def scripted(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.3 * z + x)


def hidden_by_vmap(z, x):
    return vmap(lambda z, x: torch.tanh(0.3 * z + x))(z, x)


def hidden_by_switch(z, x):
    with torch._C.DisableTorchFunction():
        return torch.tanh(0.3 * z + x)


@pytest.mark.parametrize("cell", [hidden_by_script, hidden_by_vmap, hidden_by_switch])
def test_what_cannot_be_seen_is_refused(cell):
    layer = DEQLayer(cell)
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="cannot be told"):
        grad(lambda x: layer(x).sum())(x)
    with pytest.raises(RuntimeError):  # TorchScript has something to say of its own
        jacfwd(lambda x: layer(x).sum())(x)


def test_a_compiled_cell_runs_eagerly():
    cell = torch.compile(Cell(5), backend="eager")
    layer = DEQLayer(cell, **OPTIONS)
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    close(grad(lambda x: layer(x).sum())(x.detach()), expected)
    close(vmap(lambda a: layer(a[None])[0])(x.detach()), layer(x))


def test_a_traced_cell():
    x = torch.randn(3, 5, dtype=F64)
    layer = DEQLayer(torch.jit.trace(Cell(5), (x, x)), **OPTIONS)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all()

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.jit.trace(Cell(5), (x, x))

        def forward(self, z, x):
            return self.inner(z, x)

    DEQLayer(Around(), **OPTIONS)(x).sum().backward()


@pytest.mark.parametrize("gradient", ["implicit", Unrolled(checkpoint=True), "reversible"], ids=str)
def test_functional_call_with_parameters_of_another_layer(gradient):
    """They are Parameters, as the layer's own are, and there during the call alone."""
    options = {"tol": 1e-4 if gradient == "reversible" else 1e-12, "max_iter": 300}
    layer, other = (DEQLayer(Cell(5), gradient=gradient, **options) for _ in range(2))
    x = torch.randn(3, 5, dtype=F64)
    theirs = dict(other.named_parameters())
    found = torch.autograd.grad(
        functional_call(layer, theirs, (x,)).square().sum(), list(theirs.values())
    )
    expected = torch.autograd.grad(other(x).square().sum(), list(theirs.values()))
    for got, right in zip(found, expected, strict=True):
        close(got, right)


def test_functional_call_with_a_buffer():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", 0.4 * torch.eye(3, dtype=F64))

        def forward(self, z, x):
            return torch.tanh(z @ self.w + x)

    layer, w = DEQLayer(Buffered(), **OPTIONS), torch.full((3, 3), 0.2, dtype=F64)
    x = torch.randn(2, 3, dtype=F64)
    w.requires_grad_()
    z = functional_call(layer, {"cell.w": w}, (x,))
    (found,) = torch.autograd.grad(z.square().sum(), w, create_graph=True)

    def loss(w):
        return functional_call(layer, {"cell.w": w}, (x,)).square().sum()

    close(grad(loss)(w.detach()), found)
    torch.autograd.grad(found.sum(), w)  # by the buffer that was there


@pytest.mark.parametrize("kind", ["dense", "symmetric"])
@pytest.mark.parametrize("gradient", ["implicit", "one_step", "phantom"])
def test_a_bad_sample_and_the_parameters(kind, gradient):
    layer = layer_of(kind, gradient=gradient, on_failure="ignore")
    x = input_for(layer)
    x[1] = torch.nan
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(p):
        return functional_call(layer, p, (x,)).square().sum()

    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for got, right in zip(grad(loss)(parameters).values(), expected, strict=True):
        close(got, right)
    tangent = jvp(loss, (parameters,), (parameters,))[1]
    assert tangent.isfinite()


@pytest.mark.parametrize("gradient", ["implicit", "one_step", "phantom"])
def test_a_sample_that_fails_inside_is_constant(gradient):
    def cell(z, x):
        # At zero, the last finite iterate of large x, the derivative by x is not zero.
        return torch.tanh(0.3 * z + x) + 1e160 * (x > 3).to(x.dtype) * (z.square() + x)

    layer = DEQLayer(cell, gradient=gradient, on_failure="ignore", **OPTIONS)
    x = torch.randn(3, 2, dtype=F64)
    x[1] = 5
    found = grad(lambda x: layer(x).sum())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    close(found, expected)
    assert (found[1] == 0).all()
    assert layer.last_solution.nonfinite.tolist() == [False, True, False]


def test_the_adjoint_solution_holds_no_graph():
    layer = layer_of("general")
    grad(lambda x: layer(x).sum())(torch.randn(2, 5, dtype=F64))
    assert layer.last_adjoint_solution.value.grad_fn is None
    layer.last_adjoint_solution.value.numpy()
