"""Implicit gradients: against finite differences, twice; against unrolling; in odd situations."""

import pytest
import torch
from gradient_cases import (
    FAMILIES,
    SMOOTH,
    TIGHT,
    General,
    as_function,
    make_cell,
    parameters_of,
    unrolled,
)
from torch.autograd import gradcheck, gradgradcheck

from fastdeq import (
    ACTIVATIONS,
    GMRES,
    Anderson,
    DEQLayer,
    Neumann,
    Picard,
    fixed_point,
)


@pytest.mark.parametrize("weight", FAMILIES)
@pytest.mark.parametrize("adjoint", [Neumann(), GMRES(), Anderson()], ids=repr)
def test_affine_cell_first_and_second_derivatives(weight, adjoint):
    cell = make_cell(weight=weight, n=2)
    layer = DEQLayer(cell, adjoint=adjoint, **TIGHT)
    names, leaves = parameters_of(cell)
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    run = as_function(layer, names)
    assert gradcheck(run, (x, *leaves))
    assert gradgradcheck(run, (x, *leaves))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    cell = make_cell(activation, scale=0.5)
    names, leaves = parameters_of(cell)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    run = as_function(DEQLayer(cell, **TIGHT), names)
    assert gradcheck(run, (x, *leaves))
    if activation in SMOOTH:
        assert gradgradcheck(run, (x, *leaves))


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=repr)
@pytest.mark.parametrize("adjoint", [Neumann(), GMRES(), Anderson()], ids=repr)
def test_general_map_first_and_second_derivatives(solver, adjoint):
    def run(w, c):
        f = lambda z: torch.tanh(z @ w.T + c)  # noqa: E731
        return fixed_point(f, torch.zeros_like(c), solver=solver, adjoint=adjoint, **TIGHT)[0]

    w = (0.3 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    c = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(run, (w, c))
    assert gradgradcheck(run, (w, c))


def test_general_cell_inside_functional_call():
    cell = make_cell()
    names, leaves = parameters_of(cell)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    run = as_function(DEQLayer(General(cell), **TIGHT), [f"inner.{n}" for n in names])
    assert gradcheck(run, (x, *leaves))


def test_third_derivative_of_a_scalar_problem():
    # z = theta cos z: differentiate the closed form of dz/dtheta = cos z / (1 + theta sin z) twice.
    theta = torch.tensor([[0.4]], dtype=torch.float64, requires_grad=True)
    z, _ = fixed_point(
        lambda z: theta * torch.cos(z), torch.zeros(1, 1, dtype=torch.float64), **TIGHT
    )
    derivatives = [z.sum()]
    for _ in range(3):
        (g,) = torch.autograd.grad(derivatives[-1], theta, create_graph=True)
        derivatives.append(g.sum())

    def solve(t):
        value = 0.5
        for _ in range(200):
            value = t * torch.cos(torch.as_tensor(value, dtype=torch.float64))
        return float(value)

    h = 1e-3
    third = (solve(0.4 + 2 * h) - 2 * solve(0.4 + h) + 2 * solve(0.4 - h) - solve(0.4 - 2 * h)) / (
        2 * h**3
    )
    # Central difference: error h^2 / 4 times the fifth derivative plus rounding 1e-16 / h^3.
    assert derivatives[3].item() == pytest.approx(third, abs=1e-4)


@pytest.mark.parametrize("weight", FAMILIES)
@pytest.mark.parametrize("path", ["fused", "general"])
def test_implicit_equals_unrolled(weight, path):
    cell = make_cell(weight=weight, scale=0.8, n=5, d=16)
    layer = DEQLayer(cell if path == "fused" else General(cell), **TIGHT)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn(7, 16, dtype=torch.float64)
    inputs = (x, *cell.parameters())
    ours = torch.autograd.grad((layer(x) * target).sum(), inputs)
    exact = torch.autograd.grad((unrolled(cell, x) * target).sum(), inputs)
    for a, b in zip(ours, exact, strict=True):
        # Residual 1e-12, amplified by |(I - J)^-1| <= ~1/(1 - 0.8)^2 twice over.
        assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
def test_error_follows_the_tolerance(tol):
    cell = make_cell(weight="orthogonal", scale=0.8, n=5, d=16)
    x = torch.randn(7, 5, dtype=torch.float64)
    exact = torch.autograd.grad(unrolled(cell, x).sum(), list(cell.parameters()))
    ours = torch.autograd.grad(DEQLayer(cell, tol=tol)(x).sum(), list(cell.parameters()))
    for a, b in zip(ours, exact, strict=True):
        # |z - z*| <= tol |z| / (1 - 0.8); the slope varies by at most 0.77 |z - z*|, and the
        # adjoint multiplies by 1 / (1 - 0.8) again: 25 tol (1 + |z|), |z| <= 4.
        assert (a - b).norm() <= 125 * tol * b.norm()


def test_closed_over_tensors_that_depend_on_each_other_are_counted_once():
    a = (torch.randn(4, 4, dtype=torch.float64) / 6).requires_grad_()
    b = torch.randn(3, 4, dtype=torch.float64)

    def build():
        square = a @ a  # a intermediate tensor that the map uses beside a itself
        return lambda z: torch.tanh(z @ a.T + z @ square.T + b)

    z0 = torch.zeros_like(b)
    z, _ = fixed_point(build(), z0, **TIGHT)
    (ours,) = torch.autograd.grad(z.pow(2).sum(), a, create_graph=True)
    f, z = build(), z0
    for _ in range(300):
        z = f(z)
    (exact,) = torch.autograd.grad(z.pow(2).sum(), a, create_graph=True)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)
    second = [torch.autograd.grad(g.pow(2).sum(), a)[0] for g in (ours, exact)]
    torch.testing.assert_close(*second, rtol=1e-8, atol=1e-11)


def test_tuple_state():
    a = (0.4 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    b = torch.randn(2, 3, dtype=torch.float64)

    def f(state):
        u, v = state
        return torch.tanh(v.sum(2) @ a + b), 0.25 * u.unsqueeze(2).expand(2, 3, 2).sin()

    start = (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, 2, dtype=torch.float64))
    (u, v), solution = fixed_point(f, start, **TIGHT)
    assert isinstance(solution.value, tuple)
    assert solution.status.shape == (2,)
    assert u.shape == (2, 3)
    assert v.shape == (2, 3, 2)
    (ours,) = torch.autograd.grad(u.sum() + v.pow(2).sum(), a)
    state = start
    for _ in range(100):
        state = f(state)
    (exact,) = torch.autograd.grad(state[0].sum() + state[1].pow(2).sum(), a)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


def test_one_step_gradient_is_that_of_one_application():
    cell = make_cell(d=6)
    x = torch.randn(4, 3, dtype=torch.float64)
    for path in (cell, General(cell)):
        layer = DEQLayer(path, gradient="one_step", **TIGHT)
        z = layer(x)
        torch.testing.assert_close(z, layer.last_solution.value, rtol=1e-14, atol=1e-14)
        ours = torch.autograd.grad(z.sum(), list(cell.parameters()))
        exact = torch.autograd.grad(cell(z.detach(), x).sum(), list(cell.parameters()))
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradient_penalty_trains_through_the_second_derivative():
    cell = make_cell()
    layer = DEQLayer(cell, tol=1e-10)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    g.pow(2).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in cell.parameters())


def test_a_map_that_changes_its_tensors_before_backward_says_so():
    a = torch.zeros(2, requires_grad=True)
    b = torch.zeros(2, requires_grad=True)
    late = [False]
    z, _ = fixed_point(lambda z: 0.5 * z + (b if late[0] else a), torch.zeros(1, 2))
    late[0] = True
    with pytest.raises(RuntimeError, match="did not use at the forward pass"):
        torch.autograd.grad(z.sum(), a, create_graph=True)
