"""Broyden's method: its definition, its memory, its safeguards, and both directions."""

import pytest
import torch
from slow_problems import diffusion, nonnegative_least_squares

from fastdeq import Broyden, Picard, Status, fixed_point
from fastdeq.solvers import broyden, loop

F64 = {"dtype": torch.float64}


def tanh_map(size, scale, batch=3, dtype=torch.float64):
    w = (scale * torch.randn(size, size, **F64) / size**0.5).to(dtype)
    b = torch.randn(batch, size, **F64).to(dtype)
    return (lambda z: torch.tanh(z @ w.t() + b)), torch.zeros_like(b)


def solve(f, start, solver, tol=1e-10, max_iter=300, **more):
    return loop.solve(f, start, solver, tol=tol, max_iter=max_iter, anderson_mix=None, **more)


def dense_iterates(f, start, steps, memory):
    """Of one sample, with the Jacobian as a matrix that is inverted: no safeguards."""
    size = start.numel()
    identity = torch.eye(size, **F64)
    jacobian, used = -identity, 0  # at the start -I / tau, of the first pair
    z = start.flatten()
    points = [z]
    g = f(z[None])[0] - z
    for _ in range(steps):
        following = z - torch.linalg.solve(jacobian, g)
        residual = f(following[None])[0] - following
        s, y = following - z, residual - g
        if used in (0, memory):
            tau = 1 / max(1.0, float(abs(s @ y) / (s @ s)))
            jacobian, used = -identity / tau, 0
        jacobian = jacobian + torch.outer(y - jacobian @ s, s) / (s @ s)
        used += 1
        z, g = following, residual
        points.append(z)
    return points


@pytest.mark.parametrize("memory", [1, 2, 5, 40])
def test_the_iterates_are_those_of_the_definition(memory):
    f, start = tanh_map(12, 1.2, batch=1)
    seen = []

    def watched(z):
        seen.append(z[0].clone())
        return f(z)

    solution = solve(watched, start, Broyden(memory, safeguard=float("inf")), 0.0, 12)
    assert solution.rejects["damped"].tolist() == [0]
    for mine, exact in zip(seen, dense_iterates(f, start, 12, memory), strict=True):
        # Rounding is amplified by the condition of twelve updates, each below 10 here.
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_a_linear_map_takes_twice_as_many_steps_as_it_has_dimensions(size):
    """D. Gay, SIAM J. Numer. Anal. 16 (1979) 623: 2 n updates; the first point is a plain one, and
    the last evaluation verifies. A memory longer than that is no harm."""
    a = torch.randn(size, size, **F64) / size**0.5
    b = torch.randn(4, size, **F64)
    solver = Broyden(memory=50, safeguard=float("inf"))
    solution = solve(lambda z: z @ a.t() + b, torch.zeros_like(b), solver, 1e-7)
    kept = solution.rejects["damped"] == 0  # Gay's is without damping
    assert kept.any()
    assert (solution.iterations[kept] <= 2 * size + 2).all()
    exact = torch.linalg.solve(torch.eye(size, **F64) - a, b.unsqueeze(2)).squeeze(2)
    bound = torch.linalg.matrix_norm(torch.linalg.inv(torch.eye(size, **F64) - a), 2)
    error = (solution.value - exact).norm(dim=1)
    value = (solution.value @ a.t() + b).norm(dim=1)
    assert (error <= 1e-7 * bound * value * 1.01).all()


@pytest.mark.parametrize("memory", [1, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_tanh_cells_beside_plain_steps(dtype, memory):
    f, start = tanh_map(32, 1.4, batch=24, dtype=dtype)
    tol = 1e-4
    mine, plain = (solve(f, start, s, tol, 200) for s in (Broyden(memory), Picard()))
    assert mine.converged.sum() >= 20
    if memory > 1:
        assert mine.converged.sum() >= plain.converged.sum()
        assert mine.iterations.double().mean() < 0.8 * plain.iterations.double().mean()
    wide = mine.value.double()
    value = f(mine.value).double()
    residual = (value - wide).norm(dim=1) / value.norm(dim=1)
    noise = 32 * torch.finfo(dtype).eps
    assert (residual[mine.converged] <= tol + noise).all()


@pytest.mark.parametrize("radius", [0.99, 0.999])
def test_spectral_radius_near_one(radius):
    q = torch.linalg.qr(torch.randn(40, 40, **F64))[0]
    w = q * torch.linspace(-radius, radius, 40, **F64) @ q.t()
    b = torch.randn(6, 40, **F64)
    solution = solve(lambda z: z @ w + b, torch.zeros_like(b), Broyden(), 1e-8, 1000)
    assert solution.converged.all()
    exact = torch.linalg.solve(torch.eye(40, **F64) - w, b.unsqueeze(2)).squeeze(2)
    error = (solution.value - exact).norm(dim=1) / solution.value.norm(dim=1)
    assert (error <= 1.1e-8 / (1 - radius)).all()


def test_slopes_far_below_minus_one():
    """Of a residual whose plain steps multiply it by up to 20."""
    a = torch.randn(20, 20, **F64)
    a = -a @ a.t() / 4
    b = torch.randn(6, 20, **F64)
    solution = solve(lambda z: z @ a + b, torch.zeros_like(b), Broyden(), 1e-8, 100)
    assert solution.converged.all()
    exact = torch.linalg.solve(torch.eye(20, **F64) - a, b, left=False)
    value = (solution.value @ a + b).norm(dim=1)
    assert ((solution.value - exact).norm(dim=1) <= 1.01e-8 * value).all()


@pytest.mark.parametrize("problem", ["diffusion", "nonnegative_least_squares"])
def test_problems_that_need_a_memory(problem):
    f, start = diffusion(12, 0) if problem == "diffusion" else nonnegative_least_squares(80, 40, 0)
    options = {"tol": 1e-6, "max_iter": 200, "on_failure": "ignore"}
    solution = fixed_point(f, start, solver="broyden", **options)[1]
    assert solution.converged.all()
    assert solution.iterations.max() < 80


def test_a_bad_sample_harms_no_other():
    f, start = tanh_map(16, 1.2, batch=5)

    def poisoned(z):
        calls.append(0)
        value = f(z)
        if len(calls) > 3:
            value = value.clone()
            value[2] = torch.nan
        return value

    calls = []
    good, bad = solve(f, start, Broyden()), solve(poisoned, start, Broyden())
    others = [0, 1, 3, 4]
    assert bad.status[2] == Status.NONFINITE
    assert torch.equal(good.value[others], bad.value[others])
    assert torch.equal(good.iterations[others], bad.iterations[others])
    assert bad.value.isfinite().all()


def test_a_step_into_nan_is_taken_back():
    """g is constant up to 3.95, so that updates multiply the step by ten each; beyond 4.5 is NaN.
    After a return the step is a plain one, not the same once more."""

    def f(z):
        value = z + (4 - z).clamp(max=0.05)
        return torch.where(z > 4.5, torch.nan, value)

    solution = solve(f, torch.zeros(2, 1, **F64), Broyden())
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, torch.full((2, 1), 4.0, **F64), rtol=1e-9, atol=0)
    assert (solution.rejects["safeguard"] > 0).all()
    assert (solution.iterations < 30).all()


def test_the_rounding_floor_is_met_calmly():
    """Steps that round to nothing show nothing, and are not kept."""
    f, start = tanh_map(8, 0.5, batch=6, dtype=torch.float32)
    solution = solve(f, start, Broyden(), 0.0, 400)
    assert (solution.converged | (solution.status == Status.STAGNATED)).all()
    assert (solution.residual <= 10 * torch.finfo(torch.float32).eps).all()
    assert (solution.iterations < 200).all()


def test_growth_is_taken_back_and_counted():
    """Counted again from the norms: a quasi-Newton step whose residual grew by more than the
    factor does not change the point that others are compared with."""
    f, start = tanh_map(24, 3.0, batch=12)
    norms = []

    def watched(z):
        value = f(z)
        norms.append((value - z).norm(dim=1))
        return value

    solution = solve(watched, start, Broyden(safeguard=1.5), 0.0, 40)
    trusted, backs = norms[1], torch.zeros(12, dtype=torch.int32)
    for norm in norms[2:-1]:  # the first step is plain, and none follows the last evaluation
        back = norm > 1.5 * trusted
        trusted = torch.where(back, trusted, norm)
        backs += back
    assert torch.equal(solution.rejects["safeguard"], backs)
    assert (backs > 0).sum() >= 6


def test_a_vanishing_determinant_is_damped(monkeypatch):
    """Of slope 0.98: gamma = v y = 0.02 asks for fifty times the step."""
    start = torch.tensor([[0.5], [3.0]], **F64)
    points = []

    def f(z):
        points.append(z)
        return 0.98 * z + 1

    solution = solve(f, start, Broyden(), 1e-9)
    assert (solution.rejects["damped"] > 0).all()
    # The determinant is LEAST_RATIO then: ten times the plain step.
    torch.testing.assert_close(points[2] - points[1], 10 * (1 - 0.02 * points[1]))
    assert solution.converged.all()
    monkeypatch.setattr(broyden, "LEAST_RATIO", 0.0)
    free = solve(lambda z: 0.98 * z + 1, start, Broyden(), 1e-9)
    assert (free.rejects["damped"] == 0).all()
    assert (free.iterations <= 3).all()  # the secant is the map


def test_starts_at_a_solution_and_constant_maps():
    start = torch.tensor([[1.0, 2.0], [0.0, 0.0]], **F64)
    solution = solve(lambda z: z.clone(), start, Broyden())
    assert solution.iterations.tolist() == [0, 0]
    assert torch.equal(solution.value, start)
    constant = solve(lambda z: start, torch.zeros_like(start), Broyden())
    assert constant.iterations.tolist() == [1, 0]
    assert torch.equal(constant.value, start)


@pytest.mark.parametrize("exponent", [-30, 28])
def test_states_whose_squares_leave_float32(exponent):
    a = torch.linalg.qr(torch.randn(5, 5))[0] * 0.9
    b = torch.randn(3, 5)
    unit = solve(lambda z: z @ a + b, torch.zeros_like(b), Broyden(), 1e-4)
    scale = 10.0**exponent
    # Relative: the 1e-9 beside |f(z)| is an absolute tolerance.
    scaled = solve(lambda z: z @ a + b * scale, torch.zeros_like(b), Broyden(), 1e-4, 60)
    assert scaled.converged.all()
    if exponent > 0:
        assert (scaled.iterations - unit.iterations).abs().max() <= 2


def test_the_memory_is_bounded():
    _, start = tanh_map(8, 1.3)
    state = Broyden(memory=7).init(start, loop.Problem(0.0, 0.0, 100, None, None))
    assert state.left.shape == state.right.shape == (3, 7, 8)
    short = Broyden(memory=1000).init(start, loop.Problem(0.0, 0.0, 30, None, None))
    assert short.left.shape == (3, 30, 8)  # never more than there are updates


def test_a_step_that_rounds_to_nothing_is_not_kept():
    solver, start = Broyden(), torch.ones(2, 3)
    state = solver.init(start, loop.Problem(0.0, 0.0, 9, None, None))
    value, running = start + 0.5, torch.ones(2, dtype=torch.bool)
    for _ in range(3):  # the same point again and again
        step = solver.step(state, start, value, (value - start).norm(dim=1), running)
        assert torch.equal(step.point, value)
    assert state.count.tolist() == [0, 0]
