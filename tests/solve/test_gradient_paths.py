"""Where gradients go: failures, hooks, options, and maps that do unusual things."""

import pytest
import torch
from gradient_cases import TIGHT, General, make_cell, unrolled

from fastdeq import (
    ConvergenceWarning,
    DEQLayer,
    Solution,
    Status,
    fixed_point,
)


@pytest.mark.parametrize("path", ["fused", "general"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_nonfinite_incoming_gradient_goes_out_as_nan_not_as_zero(path, bad):
    cell = make_cell()
    layer = DEQLayer(cell if path == "fused" else General(cell), on_failure="ignore")
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    z = layer(x)
    g = torch.ones_like(z)
    g[1, 0] = bad
    (gx,) = torch.autograd.grad(z, x, g)
    assert gx[1].isnan().all()
    assert gx[[0, 2]].isfinite().all()


def test_adjoint_that_fails_is_reported():
    # J = 1: no adjoint exists, while z = z + 0 holds anywhere.
    w = torch.ones(1, requires_grad=True)
    z, solution = fixed_point(lambda z: z + 0 * w, torch.ones(2, 1))
    with pytest.warns(ConvergenceWarning, match="adjoint solve: 2 of 2"):
        z.sum().backward()
    assert isinstance(solution, Solution)
    assert (solution.status == Status.CONVERGED).all()


@pytest.mark.parametrize("path", ["fused", "general"])
@pytest.mark.parametrize("adjoint", ["neumann", "gmres", "anderson", "broyden", "bicgstab"])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_gradient_is_as_good_for_tiny_and_huge_losses(path, adjoint, size):
    """A mean over a large batch sends tiny gradients; the stop test must not take them for zero."""
    cell = make_cell(weight="orthogonal", scale=0.8, n=5, d=8)
    layer = DEQLayer(cell if path == "fused" else General(cell), adjoint=adjoint, **TIGHT)
    x = torch.randn(3, 5, dtype=torch.float64)
    exact = torch.autograd.grad(unrolled(cell, x).sum(), list(cell.parameters()))
    ours = torch.autograd.grad((size * layer(x)).sum(), list(cell.parameters()))
    for a, b in zip(ours, exact, strict=True):
        assert (a / size - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("path", ["fused", "general"])
def test_hooks_and_retained_gradients_see_each_gradient_once(path):
    cell = make_cell()
    layer = DEQLayer(cell if path == "fused" else General(cell), **TIGHT)
    leaf = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(2 * leaf).sum(), leaf)
    weight = cell.injection.weight
    (plain_weight,) = torch.autograd.grad(layer(2 * leaf).sum(), weight)
    x = 2 * leaf
    x.retain_grad()
    x.register_hook(lambda g: 3 * g)
    handle = weight.register_hook(lambda g: 5 * g)
    layer(x).sum().backward()
    handle.remove()
    torch.testing.assert_close(leaf.grad, 3 * plain)
    torch.testing.assert_close(x.grad, 1.5 * plain)
    torch.testing.assert_close(weight.grad, 5 * plain_weight)


def test_hooks_and_retained_gradients_run_once_under_create_graph():
    cell = make_cell()
    leaf = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weight = cell.injection.weight
    results = []
    for solve in (DEQLayer(General(cell), **TIGHT), lambda x: unrolled(cell, x)):
        x = 2 * leaf
        x.retain_grad()
        x.register_hook(lambda g: 3 * g)
        handle = weight.register_hook(lambda g: 5 * g)
        leaf.grad = weight.grad = None
        solve(x).sum().backward(create_graph=True, inputs=[leaf, weight])
        handle.remove()
        results.append((leaf.grad.detach(), weight.grad.detach(), x.grad.detach()))
        leaf.grad = weight.grad = None
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


def test_cached_parametrization_inside_a_general_cell():
    linear = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(3, 3).double())
    layer = DEQLayer(lambda z, x: torch.tanh(0.4 * linear(z) + x), **TIGHT)
    x = torch.randn(2, 3, dtype=torch.float64)
    exact = torch.autograd.grad(layer(x).sum(), list(linear.parameters()))
    with torch.nn.utils.parametrize.cached():
        ours = torch.autograd.grad(layer(x).sum(), list(linear.parameters()))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_adjoint_solution_is_of_the_gradient_itself():
    for path in ("fused", "general"):
        cell = make_cell(activation="identity")
        layer = DEQLayer(cell if path == "fused" else General(cell), **TIGHT)
        values = []
        for size in (1.0, 1e-3):
            (size * layer(torch.ones(2, 3, dtype=torch.float64))).sum().backward()
            values.append(layer.last_adjoint_solution.value / size)
        torch.testing.assert_close(*values)


def test_adjoint_options_are_the_adjoints():
    cell = make_cell(weight="orthogonal", scale=0.8)
    x = torch.randn(4, 3, dtype=torch.float64)
    layer = DEQLayer(cell, tol=1e-3, adjoint_tol=1e-10, max_iter=50, adjoint_max_iter=200)
    layer(x).sum().backward()
    assert 1e-10 < layer.last_solution.residual.max() <= 1e-3
    assert layer.last_adjoint_solution.residual.max() <= 1e-10


@pytest.mark.parametrize("adjoint", ["gmres", "bicgstab"])
def test_singular_adjoints_end_calmly(adjoint):
    nilpotent = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    # u = g + J^T u: no solution for J = I, u = (1, 2) for the nilpotent J.
    for j, status in ((torch.eye(2).double(), Status.STAGNATED), (nilpotent, Status.CONVERGED)):
        c = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        layer = DEQLayer(lambda z, x, j=j, c=c: z @ j.T + c, adjoint=adjoint, on_failure="ignore")
        layer(torch.zeros(1, 2, dtype=torch.float64)).sum().backward()
        assert layer.last_adjoint_solution.status[0] == status
        assert c.grad.isfinite().all()
        if status == Status.CONVERGED:
            torch.testing.assert_close(c.grad, torch.tensor([[1.0, 2.0]], dtype=torch.float64))


@pytest.mark.parametrize("state", ["tensor", "tuple"])
def test_a_map_may_change_its_argument_in_place(state):
    c = torch.tensor([[2.0, 3.0]], dtype=torch.float64, requires_grad=True)

    def f(z):
        if state == "tensor":
            return z.mul_(0.5).add_(c)
        return z[0].mul_(0.5).add_(c), z[1].mul_(0.25).add_(c)

    zero = torch.zeros(1, 2, dtype=torch.float64)
    z, _ = fixed_point(f, zero if state == "tensor" else (zero, zero), **TIGHT)
    first = z if state == "tensor" else z[0]
    torch.testing.assert_close(first, 2 * c, rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(first.sum(), c)
    torch.testing.assert_close(gradient, torch.full_like(c, 2.0), rtol=1e-10, atol=0)
