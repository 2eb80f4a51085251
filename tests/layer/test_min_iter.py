"""``min_iter``: no sample converges before so many updates, in every engine alike."""

import pytest
import torch
from tracked_cases import every_kind, problem, same, whole

from fastdeq import (
    AffineCell,
    Anderson,
    BackendError,
    DEQLayer,
    Energy,
    HeavyBall,
    Picard,
    Status,
    fixed_point,
)

SOLVERS = ["auto", Picard(), Picard(damping=0.7), Anderson(), Anderson(accelerate_above=0.5)]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)


def counts(layer, x):
    z = whole(layer(x))
    return z, layer.last_solution.iterations.tolist()


@every_kind
@every_solver
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_samples_that_would_stop_earlier_go_on(kind, solver, backend):
    options = {"solver": solver, "backend": backend, "tol": 1e-3}
    layer, _, x = problem(kind, **options)
    z, free = counts(layer, x)
    assert min(free) < 8
    z, held = counts(problem(kind, min_iter=8, **options)[0], x)
    assert held == [max(n, 8) for n in free]
    layer, _, x = problem(kind, min_iter=max(free) + 3, **options)
    z_long, longest = counts(layer, x)
    assert longest == [max(free) + 3] * len(x)
    solution = layer.last_solution
    assert solution.converged.all()
    # What is returned is the best of all iterates, whose residual is the one that is reported.
    assert (solution.residual < 1e-3).all()
    exact = whole(problem(kind, tol=1e-13, max_iter=500)[0](x))
    assert ((z_long - exact).norm(dim=1) <= (z - exact).norm(dim=1) + 1e-10).all()


@pytest.mark.parametrize("solver", [Energy(), Energy(momentum=True), HeavyBall()], ids=str)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_symmetric_cells(solver, backend):
    cell = AffineCell(3, 8, weight="symmetric", scale=0.6, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    for least in (0, 9):
        layer = DEQLayer(cell, solver=solver, backend=backend, tol=1e-3, min_iter=least)
        z, made = counts(layer, x)
        assert layer.last_solution.converged.all()
        assert min(made) >= least
    exact = DEQLayer(cell, tol=1e-13, max_iter=500)(x)
    assert (z - exact).abs().max() < 1e-3


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Anderson(window=2)], ids=str)
def test_past_the_rounding_floor(backend, solver):
    """Hundreds of updates at a residual of zero neither stagnate nor break anything."""
    layer, _, x = problem("general", solver=solver, backend=backend, min_iter=300, max_iter=400)
    z, made = counts(layer, x)
    assert made == [300] * len(x)
    assert layer.last_solution.status.tolist() == [Status.CONVERGED] * len(x)
    assert (layer.last_solution.residual < 1e-13).all()
    assert z.isfinite().all()
    (grad,) = torch.autograd.grad(z.sum(), x)
    assert grad.isfinite().all()


def test_limits_and_samples_that_fail():
    layer, _, x = problem("general", min_iter=5, max_iter=5, tol=1e-2)
    assert counts(layer, x)[1] == [5] * len(x)
    assert layer.last_solution.converged.all()
    bad = x.detach().clone()
    bad[0, 0] = torch.nan
    for kind in ("fused", "general"):
        layer, _, _ = problem(kind, min_iter=6, on_failure="ignore")
        layer(bad)
        assert layer.last_solution.status[0] == Status.NONFINITE
        assert layer.last_solution.iterations[1:].min() >= 6
    z, solution = fixed_point(lambda z: 0.0 * z + 1, torch.zeros(3, 1), min_iter=4)
    assert solution.iterations.tolist() == [4] * 3
    assert solution.converged.all()
    assert (z == 1).all()


@pytest.mark.parametrize("gradient", ["phantom", "truncated", "unrolled", "reversible"])
def test_with_other_gradients(gradient):
    layer, cell, x = problem("general", gradient=gradient, min_iter=12, tol=1e-2)
    z, made = counts(layer, x)
    assert made == [12] * len(x)
    if gradient == "unrolled":
        from tracked_cases import by_hand, gradients

        expected = by_hand(cell, x, made)
        same(gradients(z, cell, x), gradients(expected, cell, x))


def test_mixed_precision_and_compact():
    torch.manual_seed(3)
    linear = torch.nn.Linear(64, 64)
    torch.nn.init.orthogonal_(linear.weight, 0.5)
    x = torch.randn(8, 64) * torch.logspace(-2, 1, 8)[:, None]
    for options in ({"precision": "mixed"}, {"compact": True}):
        layer = DEQLayer(lambda z, x: torch.tanh(linear(z) + x), min_iter=15, **options)
        z = layer(x)
        assert layer.last_solution.converged.all()
        assert (layer.last_solution.iterations >= 15).all()
        torch.testing.assert_close(torch.tanh(linear(z) + x), z, rtol=1e-3, atol=1e-3)


def test_the_adjoint_has_none():
    layer, _, x = problem("fused", min_iter=40)
    layer(x).sum().backward()
    assert layer.last_adjoint_solution.iterations.max() < 40


@pytest.mark.parametrize("least", [-1, 101, 2.5, True, "3"])
def test_wrong_numbers(least):
    with pytest.raises(
        ValueError, match="min_iter must be an integer from 0 to max_iter, here 100"
    ):
        problem("fused", min_iter=least)


@pytest.mark.parametrize("fixed", [2, 6, "certified"])
def test_fixed_counts_have_no_least(fixed):
    with pytest.raises(ValueError, match=r"min_iter=4 .*leave min_iter out, or fixed_iterations"):
        problem("fused", solver=Picard(fixed_iterations=fixed), min_iter=4)
    problem("fused", solver=Picard(fixed_iterations=fixed), min_iter=0)


def test_kernels_that_do_not_know_it_say_so(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layer, _, x = problem("fused", min_iter=3, backend="triton")
    with pytest.raises(BackendError, match="it knows no min_iter"):
        layer(x)
