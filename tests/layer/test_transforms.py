"""``torch.func`` transforms, forward mode and batched gradients against plain reverse mode.

Solves end at a relative residual of 1e-12, and every map here contracts by 0.7 or less: solutions,
and what is linear in them, are right to about 1e-11, second derivatives to a few times that.
"""

import dataclasses

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

from fastdeq import AffineCell, ConvergenceWarning, DEQLayer, fixed_point

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


KINDS = ["dense", "symmetric", "orthogonal", "general", "pair"]


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


def jacobian(f, x):
    return torch.autograd.functional.jacobian(f, x)


@pytest.mark.parametrize("kind", KINDS)
def test_jacobians_in_both_modes(kind):
    layer = layer_of(kind)
    f, x = whole(layer), input_for(layer)
    expected = jacobian(f, x)
    close(jacrev(f)(x), expected)
    close(jacfwd(f)(x), expected)
    close(torch.autograd.functional.jacobian(f, x, vectorize=True), expected)
    how = {"vectorize": True, "strategy": "forward-mode"}
    close(torch.autograd.functional.jacobian(f, x, **how), expected)
    t = torch.randn_like(x)
    close(jvp(f, (x,), (t,))[1], torch.einsum("aibj,bj->ai", expected, t))
    g = torch.randn(expected.shape[:2], dtype=F64)
    close(vjp(f, x)[1](g)[0], torch.einsum("aibj,ai->bj", expected, g))


@pytest.mark.parametrize("kind", KINDS)
def test_hessians_of_every_composition(kind):
    layer = layer_of(kind)
    x = input_for(layer, 2)

    def loss(x):
        return whole(layer)(x).pow(2).sum()

    expected = torch.autograd.functional.hessian(loss, x)
    for inner in (jacrev, jacfwd):
        for outer in (jacrev, jacfwd):
            close(outer(inner(loss))(x), expected)
    close(hessian(loss)(x), expected)
    close(torch.autograd.functional.hessian(loss, x, vectorize=True), expected)


@pytest.mark.parametrize("kind", ["dense", "general"])
def test_third_derivatives(kind):
    layer = layer_of(kind)
    x, t = input_for(layer, 1), input_for(layer, 1)

    def third(x):
        def along(s):
            return layer(x + s * t).pow(2).sum()

        return grad(grad(grad(along)))(torch.zeros((), dtype=F64))

    def along(s):
        return layer(x + s * t).pow(2).sum()

    s = torch.zeros((), dtype=F64, requires_grad=True)
    value = along(s)
    for _ in range(3):
        (value,) = torch.autograd.grad(value, s, create_graph=True)
    close(third(x), value.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_checks_itself(kind):
    layer = layer_of(kind)
    f = whole(layer)
    x = input_for(layer, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        f,
        x,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )
    assert torch.autograd.gradgradcheck(f, x, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_samples_and_of_their_gradients(kind):
    layer = layer_of(kind)
    f, x = whole(layer), input_for(layer, 4)
    close(vmap(lambda a: f(a[None])[0])(x), f(x).detach())
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, a):
        z = functional_call(layer, parameters, (a[None],))
        return (torch.cat(z, 1) if isinstance(z, tuple) else z).pow(2).sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(len(x)):
        one = torch.autograd.grad(f(x[i : i + 1]).pow(2).sum(), list(layer.parameters()))
        for got, expected in zip(each.values(), one, strict=True):
            close(got[i], expected)


@pytest.mark.parametrize("kind", ["dense", "general", "pair"])
def test_an_ensemble_of_layers(kind):
    layers = [layer_of(kind) for _ in range(3)]
    x = input_for(layers[0])
    parameters, buffers = stack_module_state(layers)

    def one(parameters, x):
        z = functional_call(layers[0], (parameters, {}), (x,))
        return torch.cat(z, 1) if isinstance(z, tuple) else z

    assert not buffers or kind == "dense"
    found = vmap(one, (0, None))(parameters, x)
    for z, layer in zip(found, layers, strict=True):
        close(z, whole(layer)(x).detach())
    grads = vmap(grad(lambda p, x: one(p, x).sum()), (0, None))(parameters, x)
    for i, layer in enumerate(layers):
        expected = torch.autograd.grad(whole(layer)(x).sum(), list(layer.parameters()))
        for got, right in zip(grads.values(), expected, strict=True):
            close(got[i], right)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_move_in_forward_mode(kind):
    layer = layer_of(kind)
    x = input_for(layer)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    moved = {name: torch.randn_like(p) for name, p in parameters.items()}

    def run(parameters):
        z = functional_call(layer, parameters, (x,))
        return torch.cat(z, 1) if isinstance(z, tuple) else z

    tangent = jvp(run, (parameters,), (moved,))[1]
    rows = jacrev(run)(parameters)
    expected = sum(
        torch.tensordot(rows[name], moved[name], dims=moved[name].dim()) for name in moved
    )
    close(tangent, expected)


@pytest.mark.parametrize("kind", ["dense", "general"])
def test_dual_numbers(kind):
    layer = layer_of(kind)
    f, x = whole(layer), input_for(layer)
    t = torch.randn_like(x)
    with forward_ad.dual_level():
        z = f(forward_ad.make_dual(x, t))
        tangent = forward_ad.unpack_dual(z).tangent
    close(tangent.detach(), torch.einsum("aibj,bj->ai", jacobian(f, x), t))


def test_two_inner_steps_of_meta_learning():
    layer, x = layer_of("general"), torch.randn(3, 5, dtype=F64)
    cell = layer.cell

    def unrolled(parameters, x):
        z = torch.zeros_like(x)
        for _ in range(120):
            own = {name.removeprefix("cell."): p for name, p in parameters.items()}
            z = functional_call(cell, own, (z, x))
        return z

    def meta(solve):
        parameters = dict(layer.named_parameters())
        fast = dict(parameters)
        for _ in range(2):
            loss = (solve(fast, x) - 0.5).pow(2).sum()
            steps = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {k: v - 0.1 * d for (k, v), d in zip(fast.items(), steps, strict=True)}
        return torch.autograd.grad(solve(fast, x + 1).pow(2).sum(), list(parameters.values()))

    ours = meta(lambda parameters, x: functional_call(layer, parameters, (x,)))
    for got, expected in zip(ours, meta(unrolled), strict=True):
        close(got, expected)


def test_a_function_that_closes_over_what_is_transformed():
    weight = 0.5 * torch.linalg.qr(torch.randn(4, 4, dtype=F64))[0]
    x = torch.randn(3, 4, dtype=F64)

    def solve(weight, x):
        return fixed_point(lambda z: torch.cos(z @ weight + x), torch.zeros_like(x), **OPTIONS)[0]

    expected = torch.autograd.functional.jacobian(lambda w: solve(w, x), weight)
    close(jacfwd(solve)(weight, x), expected)
    close(jacrev(solve)(weight, x), expected)
    rows = vmap(solve, (None, 0))(weight, x[:, None])
    close(rows[:, 0], solve(weight, x))
    assert torch.equal(
        grad(lambda c: fixed_point(lambda z: c, c, **OPTIONS)[0].sum())(x), x * 0 + 1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_sample_harms_no_other(kind):
    layer = layer_of(kind)
    f, x = whole(layer), input_for(layer, 4)
    expected = grad(lambda x: f(x).sum())(x)
    x[1] = torch.nan
    layer.options = dataclasses.replace(layer.options, on_failure="ignore")
    z = vmap(lambda a: f(a[None])[0])(x)
    assert (z[1] == 0).all()
    found = grad(lambda x: f(x).sum())(x)
    assert (found[1] == 0).all()
    close(found[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_around_autograd(kind):
    layer = layer_of(kind)
    x = input_for(layer).requires_grad_()
    z = whole(layer)(x)
    rows = torch.randn(2, 3, *z.shape, dtype=F64)

    def pull(g):
        return torch.autograd.grad(z, x, g, retain_graph=True)[0]

    expected = torch.einsum("aibj,klai->klbj", jacobian(whole(layer), x.detach()), rows)
    close(vmap(vmap(pull))(rows), expected)
    batched = torch.autograd.grad(z, x, rows[0], is_grads_batched=True, create_graph=True)[0]
    close(batched, expected[0])
    (again,) = torch.autograd.grad(batched.pow(2).sum(), x, retain_graph=True)
    one_by_one = [torch.autograd.grad(z, x, g, create_graph=True)[0] for g in rows[0]]
    close(again, torch.autograd.grad(torch.stack(one_by_one).pow(2).sum(), x)[0])


def test_the_solution_is_made_of_plain_tensors():
    layer = layer_of("general")
    x = torch.randn(4, 5, dtype=F64)
    vmap(grad(lambda a: layer(a[None]).sum()))(x)
    solution, adjoint = layer.last_solution, layer.last_adjoint_solution
    assert bool(solution.converged.all())
    assert bool(adjoint.converged.all())
    assert len(solution.status) == 4


def test_failures_are_told_under_transforms():
    layer = DEQLayer(lambda z, x: 3 * z + x, tol=1e-12, max_iter=5, solver="picard")
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        vmap(lambda a: layer(a[None]))(torch.ones(2, 3))


@pytest.mark.parametrize("kind", ["dense", "general"])
def test_one_step_under_transforms(kind):
    layer = layer_of(kind, gradient="one_step")
    x = input_for(layer).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    close(grad(lambda x: layer(x).sum())(x.detach()), expected)
