"""Newton-Krylov: against exact solutions, its evaluations, its backtracking, and one bad sample."""

import pytest
import torch

from fastdeq import AffineCell, Anderson, BackendError, DEQLayer, NewtonKrylov, Status, fixed_point
from fastdeq.ops import anderson_mix
from fastdeq.solvers import loop

F64 = {"dtype": torch.float64}


def tanh_map(size, scale, batch=3, dtype=torch.float64):
    w = (scale * torch.randn(size, size, **F64) / size**0.5).to(dtype)
    b = torch.randn(batch, size, **F64).to(dtype)
    return (lambda z: torch.tanh(z @ w.t() + b)), torch.zeros_like(b)


def solve(f, start, solver=None, tol=1e-10, max_iter=500):
    mix, solver = anderson_mix.reference, solver or NewtonKrylov()
    return loop.solve(f, start, solver, tol=tol, max_iter=max_iter, anderson_mix=mix)


def watched(f):
    seen = []

    def g(z):
        value = f(z)
        seen.append((z.clone(), value))
        return value

    return g, seen


@pytest.mark.parametrize("size", [1, 2, 6])
def test_a_linear_map_takes_one_newton_step(size):
    """With a space of all dimensions and a forcing of 0.3 a few steps; residuals of an affine map
    follow the linear system's to the rounding of the differences."""
    a = 0.9 * torch.randn(size, size, **F64) / size**0.5
    b = torch.randn(4, size, **F64)
    solution = solve(lambda z: z @ a.t() + b, torch.zeros_like(b), tol=1e-10)
    assert solution.converged.all()
    assert (solution.rejects["plain"] == 0).all()
    exact = torch.linalg.solve(torch.eye(size, **F64) - a, b.unsqueeze(2)).squeeze(2)
    bound = torch.linalg.matrix_norm(torch.linalg.inv(torch.eye(size, **F64) - a), 2)
    value = (solution.value @ a.t() + b).norm(dim=1)
    assert ((solution.value - exact).norm(dim=1) <= 1.01e-10 * bound * value).all()


def test_in_one_dimension_the_trials_are_newtons():
    """z - (f(z) - z) / (f'(z) - 1), to the error of the differences: h |f''| / 2 times the step."""
    f, seen = watched(lambda z: torch.cos(3 * z))
    start = torch.full((1, 1), 0.3, **F64)
    assert solve(f, start, tol=1e-13).converged.all()
    trials = [z.item() for z, _ in seen[::2]]  # every other evaluation is a difference
    z = 0.3
    for trial in trials:
        assert trial == pytest.approx(z, abs=1e-6)
        wide = torch.tensor(trial, **F64)
        slope = -3 * torch.sin(3 * wide) - 1
        z = (wide - (torch.cos(3 * wide) - wide) / slope).item()
    assert len(trials) <= 7  # quadratic


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ill_conditioned_maps_take_fewer_evaluations_than_anderson(dtype):
    q = torch.linalg.qr(torch.randn(20, 20, **F64))[0]
    w, b = (0.99 * q).to(dtype), torch.randn(4, 20, **F64).to(dtype)
    tol = 1e-5 if dtype == torch.float32 else 1e-9
    mine, other = (
        solve(lambda z: z @ w + b, torch.zeros_like(b), s, tol)
        for s in (NewtonKrylov(), Anderson(window=10))
    )
    assert mine.converged.all()
    assert mine.iterations.double().mean() < 0.6 * other.iterations.double().mean()
    exact = torch.linalg.solve(torch.eye(20, **F64) - w.double(), b.double(), left=False)
    error = (mine.value.double() - exact).norm(dim=1) / exact.norm(dim=1)
    bound = torch.linalg.matrix_norm(torch.linalg.inv(torch.eye(20, **F64) - w.double()), 2)
    assert (error <= bound * (1.1 * tol + 8 * torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("restart", [3, 10, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_cells(dtype, restart):
    f, start = tanh_map(24, 1.2, batch=12, dtype=dtype)
    solution = solve(f, start, NewtonKrylov(restart), 1e-5)
    assert solution.converged.sum() >= 11
    value = f(solution.value).double()
    residual = (value - solution.value.double()).norm(dim=1) / value.norm(dim=1)
    noise = 24 * torch.finfo(dtype).eps
    assert (residual[solution.converged] <= 1e-5 + noise).all()


def test_slopes_far_from_the_unit_circle():
    """Plain steps diverge by a factor of up to 50 each."""
    a = torch.randn(10, 10, **F64)
    a = -2 * a @ a.t()
    b = torch.randn(5, 10, **F64)
    f = lambda z: torch.tanh(z) @ a + b  # noqa: E731
    solution = solve(f, torch.zeros_like(b), NewtonKrylov(), 1e-9, 1000)
    assert solution.converged.all()
    assert ((f(solution.value) - solution.value).abs() <= 1e-7).all()


def test_steps_that_raise_the_residual_are_shortened():
    """arctan: Newton from beyond 1.39 goes back and forth, further each time."""
    f, seen = watched(lambda z: z - torch.atan(z))
    start = torch.tensor([[3.0], [0.5]], **F64)
    solution = solve(f, start, NewtonKrylov(safeguard=1.0), 1e-4, 60)
    assert (solution.value.abs() < 1e-3).all()
    assert solution.rejects["backtracked"][0] > 0
    assert solution.rejects["backtracked"][1] == 0
    assert solution.rejects["plain"].tolist() == [0, 0]
    assert torch.stack([z for z, _ in seen]).abs().max() < 30
    loose = solve(f, start, NewtonKrylov(safeguard=10.0), 1e-4, 60)
    assert loose.rejects["backtracked"][0] == 0  # arctan never grows by ten


def test_a_bad_sample_harms_no_other():
    f, start = tanh_map(16, 1.1, batch=5)
    calls = []

    def poisoned(z):
        calls.append(0)
        value = f(z)
        if len(calls) > 3:
            value = value.clone()
            value[2] = torch.nan
        return value

    good, bad = solve(f, start), solve(poisoned, start)
    others = [0, 1, 3, 4]
    assert bad.status[2] == Status.NONFINITE
    torch.testing.assert_close(good.value[others], bad.value[others], rtol=1e-12, atol=1e-12)
    assert torch.equal(good.iterations[others], bad.iterations[others])
    assert bad.value.isfinite().all()


def test_trials_into_nan_are_shortened():
    """log is not defined where a full step would go."""
    f = lambda z: z - torch.log(z) * 3  # noqa: E731
    start = torch.tensor([[20.0], [1.5]], **F64)
    solution = solve(f, start, NewtonKrylov(), 1e-9)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, torch.ones_like(start), rtol=1e-8, atol=0)
    assert solution.rejects["backtracked"][0] > 0


@pytest.mark.parametrize("budget", range(1, 9))
def test_a_short_budget_ends_with_an_iterate(budget):
    f, start = tanh_map(12, 0.9)
    g, seen = watched(f)
    solution = solve(g, start, NewtonKrylov(), 1e-14, budget)
    assert len(seen) == budget + 1
    z, value = seen[-1]
    last = (value - z).norm(dim=1) / value.norm(dim=1)
    assert (solution.residual <= last * (1 + 1e-9)).all()
    assert (solution.residual < 1).all()
    for before, _ in seen[:-1]:  # no difference, which lies next to another point
        assert ((z - before).norm(dim=1) > 1e-6 * z.norm(dim=1)).all()


@pytest.mark.parametrize("difference", [0.0, 0.05])
def test_the_width_of_a_difference(difference):
    f, start = tanh_map(8, 0.9, batch=6, dtype=torch.float32)
    g, seen = watched(f)
    solve(g, start, NewtonKrylov(difference=difference), 1e-2, 60)
    (at, value), (beside, _) = seen[:2]
    width = (beside - at).norm(dim=1) / value.norm(dim=1)  # |z| is 0 there
    expected = difference or torch.finfo(torch.float32).eps ** 0.5
    torch.testing.assert_close(width, torch.full_like(width, expected), rtol=1e-4, atol=0)


def test_cells_of_low_precision_take_wider_differences():
    f, start = tanh_map(8, 0.9, batch=6, dtype=torch.float32)
    rounded = lambda z: f(z).bfloat16().float()  # noqa: E731
    narrow, wide = (
        solve(rounded, start, NewtonKrylov(difference=d), 1e-2, 60) for d in (0.0, 0.05)
    )
    assert wide.converged.all()
    assert wide.iterations.sum() <= narrow.iterations.sum()


def test_tuple_states_and_affine_cells():
    b = torch.randn(4, 3, requires_grad=True, **F64)
    (x, _), solution = fixed_point(
        lambda s: (torch.tanh(s[1] + b), 0.5 * s[0]),
        (torch.zeros(4, 3, **F64), torch.zeros(4, 3, **F64)),
        solver="newton_krylov",
        tol=1e-10,
        max_iter=300,
    )
    assert solution.converged.all()
    (grad,) = torch.autograd.grad(x.sum(), b)
    slope = 1 - x.detach() ** 2
    torch.testing.assert_close(grad, slope / (1 - 0.5 * slope), rtol=1e-7, atol=1e-9)
    layer = DEQLayer(AffineCell(3, 8, scale=0.9).double(), solver="newton_krylov", tol=1e-9)
    layer(b)
    assert layer.last_solution.converged.all()
    assert layer.last_solution.path == "fused"


def test_it_is_for_forward_problems_and_in_plain_pytorch():
    for given in ("newton_krylov", NewtonKrylov()):
        with pytest.raises(ValueError, match="forward problems only"):
            fixed_point(torch.cos, torch.zeros(1, 1), adjoint=given)
    layer = DEQLayer(AffineCell(3, 4, scale=0.9), solver="newton_krylov", backend="cpp")
    with pytest.raises(BackendError, match="no solver 'newton_krylov'"):
        layer(torch.randn(2, 3))
    for options in ({"restart": 0}, {"difference": 2.0}, {"safeguard": 0.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            NewtonKrylov(**options)
