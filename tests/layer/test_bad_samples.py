"""One bad sample: it has a defined outcome, and harms no other."""

import pytest
import torch
from layer_cases import every_solver

import fastdeq.layer as layer_module
from fastdeq import (
    AffineCell,
    Anderson,
    DEQLayer,
    Status,
    fixed_point,
)
from fastdeq.solve import nonfinite


@every_solver
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_one_bad_sample_harms_no_other(make_layer, solver, poison):
    layer = make_layer(solver=solver, on_failure="ignore")
    x = torch.randn(5, 6)
    bad = x.clone()
    bad[2, 3] = poison
    others = [0, 1, 3, 4]
    results = []
    for batch in (x, bad):
        batch = batch.requires_grad_()
        layer.zero_grad()
        z = layer(batch)
        z[others].pow(2).sum().backward()
        results.append(
            (z[others], batch.grad[others], [p.grad.clone() for p in layer.parameters()])
        )
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
    for clean, dirty in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(clean, dirty, rtol=1e-5, atol=1e-6)
    status = layer.last_solution.status
    assert status[2] == Status.NONFINITE
    assert (status[others] == Status.CONVERGED).all()
    assert (z[2] == 0).all()


def test_bad_sample_in_the_loss_gives_finite_gradients(make_layer):
    layer = make_layer(on_failure="ignore")
    x = torch.randn(5, 6)
    x[0] = torch.nan
    layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@every_solver
def test_map_that_turns_nan_for_one_sample_returns_its_best_finite_iterate(solver):
    def f(z):
        out = 0.5 * z + 1
        trap = torch.tensor([[False], [True], [False]]) & (z > 1.2)
        return torch.where(trap, torch.nan, out)

    z, solution = fixed_point(f, torch.zeros(3, 1), solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert z.isfinite().all()
    assert 0 < z[1, 0] <= 1.2
    torch.testing.assert_close(z[[0, 2]], torch.full((2, 1), 2.0), rtol=1e-3, atol=0)


@every_solver
def test_overflowing_map_ends_nonfinite_with_a_finite_state(solver):
    z, solution = fixed_point(
        lambda z: z**3 + 1e20, torch.ones(2, 2), solver=solver, on_failure="ignore"
    )
    assert (solution.status == Status.NONFINITE).all()
    assert z.isfinite().all()


def expansive(n):
    """relu(1e10 z + c): a negative c settles at zero, a positive one overflows in four steps."""
    cell = AffineCell(n, n, activation="relu", weight=Constant(n))
    with torch.no_grad():
        cell.injection.weight.copy_(torch.eye(n))
        cell.injection.bias.zero_()
    return cell


class Constant(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        self.w = torch.nn.Parameter(1e10 * torch.eye(n))

    def forward(self):
        return self.w


@pytest.mark.parametrize("path", ["fused", "general"])
@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
def test_sample_that_overflows_inside_has_zero_gradient(path, gradient):
    cell = expansive(2)
    inner = cell if path == "fused" else (lambda z, x: cell(z, x))
    layer = DEQLayer(inner, solver="picard", gradient=gradient, on_failure="ignore")
    x = torch.tensor([[-1.0, -2.0], [1.0, 2.0]], requires_grad=True)
    z = layer(x)
    assert layer.last_solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert z.isfinite().all()
    (z * torch.tensor([[1.0, 1.0], [5.0, 7.0]])).sum().backward()
    assert (x.grad[1] == 0).all()
    assert all((p.grad == 0).all() for p in cell.parameters())


@every_solver
def test_nan_of_one_sample_stays_in_its_row_of_the_loop(solver):
    """Through a closure, so that no layer cleans the input first."""
    c = torch.randn(4, 5, dtype=torch.float64)
    clean, _ = fixed_point(lambda z: 0.5 * torch.tanh(z) + c, torch.zeros_like(c), solver=solver)
    c = c.clone()
    c[2, 1] = torch.nan
    dirty, solution = fixed_point(
        lambda z: 0.5 * torch.tanh(z) + c, torch.zeros_like(c), solver=solver, on_failure="ignore"
    )
    others = [0, 1, 3]
    assert torch.equal(clean[others], dirty[others])
    assert solution.status.tolist() == [0, 0, Status.NONFINITE, 0]


@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
def test_fused_sample_with_an_overflowing_injection_has_zero_gradient(activation):
    cell = AffineCell(3, 3, activation=activation, weight="orthogonal", scale=0.5)
    with torch.no_grad():
        cell.injection.weight.mul_(10)
    layer = DEQLayer(cell, on_failure="ignore")
    x = torch.randn(3, 3)
    x[1] = 3e38  # finite, and infinite or NaN once injected
    z = layer(x.requires_grad_())
    if activation != "tanh":
        assert layer.last_solution.status[1] == Status.NONFINITE
    g = torch.ones_like(z)
    g[1] = torch.nan if layer.last_solution.status[1] == Status.NONFINITE else 0.0
    gradients = torch.autograd.grad(z, [x, *cell.parameters()], g)
    assert all(t.isfinite().all() for t in gradients)
    assert (gradients[0][1] == 0).all()


def test_nonfinite_warm_start_starts_from_zero(make_layer):
    layer = make_layer()
    x = torch.randn(3, 6)
    expected = layer(x)
    start = torch.zeros(3, 6)
    start[1] = torch.nan
    torch.testing.assert_close(layer(x, z0=start), expected)


def test_input_that_is_not_per_sample_is_left_as_it_is():
    shared = torch.tensor([[torch.nan, 0.0]])
    layer = DEQLayer(lambda z, x: 0.5 * z + x, on_failure="ignore")
    layer(shared, z0=torch.zeros(3, 2))
    assert (layer.last_solution.status == Status.NONFINITE).all()


def test_anderson_takes_back_a_step_restarts_and_counts():
    """Below 3 the secant points at 5, where a trap waits; the fixed point is 3.4."""

    def f(z):
        gentle = torch.where(z < 3, 0.9 * z + 0.5, 0.5 * z + 1.7)
        return torch.where(z > 4, -100.0, gentle)

    z, solution = fixed_point(
        f, torch.zeros(3, 1, dtype=torch.float64), solver=Anderson(), tol=1e-8
    )
    assert solution.converged.all()
    torch.testing.assert_close(z, torch.full_like(z, 3.4), rtol=1e-7, atol=0)
    assert (solution.rejects["safeguard"] >= 1).all()


def test_counters_stop_when_their_sample_stops():
    """The first sample converges at once and is then frozen for as long as the other needs."""
    rates = torch.tensor([[0.0], [0.97]], dtype=torch.float64)
    f = lambda z: rates * torch.sin(z) + 1  # noqa: E731
    start = torch.ones(2, 1, dtype=torch.float64)
    _, solution = fixed_point(f, start, solver=Anderson(window=4), tol=1e-13)
    assert solution.iterations[0] == 0
    assert solution.iterations[1] > 4
    assert all(int(count[0]) == 0 for count in solution.rejects.values())
    assert solution.rejects["rank_cut"][1] > 0


@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
@pytest.mark.parametrize("poison", [torch.nan, -torch.inf])
@pytest.mark.parametrize("start", [None, 0.3])
@pytest.mark.parametrize("activation", ["tanh", "hardtanh", "softplus"])
def test_fused_samples_are_set_aside_without_a_look_at_the_input(
    monkeypatch, gradient, poison, start, activation
):
    """As on a GPU, where nothing is read before the solve."""
    cell = AffineCell(4, 7, activation=activation, weight="orthogonal", scale=0.4)
    layer = DEQLayer(cell, gradient=gradient, on_failure="ignore")
    x = torch.randn(5, 4)
    x[3, 1] = poison
    z0 = None if start is None else torch.full((5, 7), start)
    found = []
    for looks in (True, False):
        with monkeypatch.context() as patch:
            if not looks:
                patch.setattr(layer_module, "plan_for", lambda *_: None)
                patch.setattr(nonfinite, "_is_surely_finite", lambda x: False)
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            z = layer(leaf, z0=z0)
            z.sum().backward()
            found.append((z, leaf.grad, *(p.grad for p in layer.parameters())))
            solution = layer.last_solution
            assert solution.status.tolist() == [0, 0, 0, Status.NONFINITE, 0]
            assert (solution.iterations[3], solution.residual[3]) == (0, torch.inf)
            assert (z[3] == 0).all()
            assert (leaf.grad[3] == 0).all()
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


def test_hooks_on_the_input_map_are_run():
    cell = AffineCell(4, 7, scale=0.4)
    layer = DEQLayer(cell)
    x = torch.randn(5, 4)
    plain = layer(x)
    handle = cell.injection.register_forward_hook(lambda module, args, out: 2 * out)
    doubled = layer(x)
    handle.remove()
    assert not torch.equal(plain, doubled)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    layer(x)
    handle.remove()
    assert len(seen) >= 2  # the input map and the layer at least
    cell.injection.forward = lambda x: torch.zeros(len(x), 7)
    assert (layer(x) == 0).all()
