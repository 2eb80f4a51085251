"""Implicit gradients: against finite differences, twice; against unrolling; in odd situations."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastdeq import (
    ACTIVATIONS,
    GMRES,
    AffineCell,
    Anderson,
    ConvergenceWarning,
    DEQLayer,
    Neumann,
    Picard,
    Solution,
    Status,
    fixed_point,
)

TIGHT = {"tol": 1e-12, "max_iter": 400}
SMOOTH = [a for a in ACTIVATIONS if a not in ("relu", "leaky_relu", "hardtanh")]
FAMILIES = ["dense", "orthogonal", "symmetric"]


def make_cell(activation="tanh", weight="dense", scale=0.6, n=3, d=3):
    return AffineCell(n, d, activation=activation, weight=weight, scale=scale, dtype=torch.float64)


def parameters_of(cell):
    """x-independent inputs for gradcheck: fresh leaves in place of the cell's parameters."""
    names, values = zip(*cell.named_parameters(), strict=True)
    leaves = tuple(v.detach().clone().requires_grad_() for v in values)
    return names, leaves


def as_function(layer, names):
    """The layer as a function of x and its parameters' values."""

    def run(x, *values):
        arguments = {f"cell.{n}": v for n, v in zip(names, values, strict=True)}
        return torch.func.functional_call(layer, arguments, (x,))

    return run


class General(torch.nn.Module):
    """Hides an AffineCell from the fused path: the general one must agree with it."""

    def __init__(self, cell):
        super().__init__()
        self.inner = cell

    def initial_state(self, x):
        return x.new_zeros(len(x), self.inner.features)

    def forward(self, z, x):
        return self.inner(z, x)


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


def unrolled(cell, x, steps=200):
    z = x.new_zeros(len(x), cell.features)
    for _ in range(steps):
        z = cell(z, x)
    return z


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


@pytest.mark.parametrize("path", ["fused", "general"])
def test_nonfinite_incoming_gradient_goes_out_as_nan_not_as_zero(path):
    cell = make_cell()
    layer = DEQLayer(cell if path == "fused" else General(cell), on_failure="ignore")
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    z = layer(x)
    g = torch.ones_like(z)
    g[1, 0] = torch.inf
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
@pytest.mark.parametrize("adjoint", ["neumann", "gmres", "anderson"])
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


def test_forward_mode_is_refused_not_wrong():
    layer = DEQLayer(lambda z, x: torch.tanh(0.3 * z + x))
    x = torch.randn(2, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            layer(dual)


def test_singular_adjoints_of_gmres_end_calmly():
    nilpotent = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    # u = g + J^T u: no solution for J = I, u = (1, 2) for the nilpotent J.
    for j, status in ((torch.eye(2).double(), Status.STAGNATED), (nilpotent, Status.CONVERGED)):
        c = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        layer = DEQLayer(lambda z, x, j=j, c=c: z @ j.T + c, adjoint="gmres", on_failure="ignore")
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
