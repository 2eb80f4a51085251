"""Every solver on problems whose answers are known."""

import math

import pytest
import torch

from fastdeq import (
    GMRES,
    Anderson,
    BiCGStab,
    Broyden,
    Neumann,
    NewtonKrylov,
    Picard,
    Status,
    fixed_point,
)

FORWARD = [Picard(), Picard(damping=0.7), Anderson(), Anderson(window=1), Anderson(damping=0.8)]
FORWARD += [
    Anderson(kind="I"),
    Anderson(kind="I", damping=0.8),
    Broyden(),
    Broyden(memory=1),
    Broyden(damping=0.8),
    NewtonKrylov(),
]
ADJOINT = ["neumann", "gmres", "anderson", "picard", "broyden", "bicgstab"]
TIGHT = {"tol": 1e-12, "max_iter": 2000}

forward = pytest.mark.parametrize("solver", FORWARD, ids=repr)
adjoint = pytest.mark.parametrize("adjoint", ADJOINT)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@forward
@adjoint
def test_cosine_with_its_derivative(solver, adjoint):
    theta = f64(0.0, 0.3, -0.5)[:, None].requires_grad_()
    z, solution = fixed_point(
        lambda z: torch.cos(z) + theta,
        torch.zeros_like(theta),
        solver=solver,
        adjoint=adjoint,
        **TIGHT,
    )
    assert solution.converged.all()
    assert z[0].item() == pytest.approx(0.7390851332151607, abs=1e-11)
    (gradient,) = torch.autograd.grad(z.sum(), theta)
    torch.testing.assert_close(gradient, 1 / (1 + torch.sin(z)), rtol=1e-10, atol=0)


@forward
def test_square_root_of_two(solver):
    z, solution = fixed_point(
        lambda z: (z + 2 / z) / 2, f64(1.0, 10.0)[:, None], solver=solver, **TIGHT
    )
    assert solution.converged.all()
    torch.testing.assert_close(z, torch.full_like(z, math.sqrt(2)), rtol=1e-11, atol=0)


@forward
@adjoint
def test_scaling_map_has_the_zero_state_and_zero_gradient(solver, adjoint):
    theta = f64(0.5).requires_grad_()
    z, solution = fixed_point(
        lambda z: theta * z,
        torch.ones(2, 3, dtype=torch.float64),
        solver=solver,
        adjoint=adjoint,
        tol=1e-6,
        max_iter=2000,
    )
    assert solution.converged.all()
    # |z| / 2 <= tol * (|z| / 2 + 1e-9): at the zero state the tolerance is absolute.
    assert z.abs().max() <= 1e-14
    (gradient,) = torch.autograd.grad(z.sum(), theta)
    assert abs(gradient.item()) <= 6 * 2 * 1e-14  # sum of z / (1 - theta)


@forward
@adjoint
def test_constant_map_takes_one_step_and_has_gradient_one(solver, adjoint):
    c = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    z, solution = fixed_point(
        lambda z: c, torch.zeros(3, 4, dtype=torch.float64), solver=solver, adjoint=adjoint, **TIGHT
    )
    if getattr(solver, "damping", 0.0) == 1.0:
        assert solution.iterations.tolist() == [1, 1, 1]
    torch.testing.assert_close(z, c, rtol=1e-11, atol=1e-11)
    (gradient,) = torch.autograd.grad(z.sum(), c)
    torch.testing.assert_close(gradient, torch.ones_like(c), rtol=1e-12, atol=0)


@forward
def test_quintic(solver):
    d = torch.linspace(-0.4, 0.4, 9, dtype=torch.float64)[:, None].requires_grad_()
    z, solution = fixed_point(lambda z: d + z**5, torch.zeros_like(d), solver=solver, **TIGHT)
    assert solution.converged.all()
    torch.testing.assert_close(z, d + z**5, rtol=1e-11, atol=1e-13)
    (gradient,) = torch.autograd.grad(z.sum(), d)
    torch.testing.assert_close(gradient, 1 / (1 - 5 * z**4), rtol=1e-9, atol=0)


def test_slow_diagonal_anderson_needs_few_steps_where_picard_needs_thousands():
    rates = f64(0.9, 0.99, 0.999)
    start = torch.ones(2, 3, dtype=torch.float64)
    f = lambda z: rates * z + 1.0  # noqa: E731
    fast, solution = fixed_point(f, start, solver=Anderson(window=3), tol=1e-13, max_iter=50)
    assert solution.converged.all()
    assert solution.iterations.max() <= 8
    torch.testing.assert_close(fast[0], 1 / (1 - rates), rtol=1e-9, atol=0)
    _, slow = fixed_point(f, start, solver="picard", tol=1e-6, max_iter=500, on_failure="ignore")
    assert (slow.status == Status.MAX_ITER).all()


def symmetric_affine(n=200, batch=3):
    m = torch.randn(n, n, dtype=torch.float64)
    m = (m + m.T) * (0.9 / math.sqrt(8 * n))
    return m.requires_grad_(), torch.randn(batch, n, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@adjoint
def test_symmetric_affine_map_and_gradients_in_closed_form(solver, adjoint):
    m, b = symmetric_affine()
    z, solution = fixed_point(
        lambda z: z @ m.T + b, torch.zeros_like(b), solver=solver, adjoint=adjoint, **TIGHT
    )
    assert solution.converged.all()
    inverse = torch.linalg.inv(torch.eye(len(m), dtype=m.dtype) - m.detach())
    exact = b.detach() @ inverse.T
    # |z - z*| <= |(I - M)^-1| |r|, with |(I - M)^-1| <= 1 / (1 - 0.9) and |r| <= 1e-12 |z|.
    torch.testing.assert_close(z.detach(), exact, rtol=0, atol=10 * 1e-12 * exact.norm().item())
    g = torch.randn_like(b)
    grad_m, grad_b = torch.autograd.grad((z * g).sum(), (m, b))
    u = g @ inverse
    torch.testing.assert_close(grad_b, u, rtol=0, atol=1e-10 * u.norm().item())
    expected = u.T @ exact
    torch.testing.assert_close(grad_m, expected, rtol=0, atol=1e-9 * expected.norm().item())


@pytest.mark.parametrize("adjoint", [GMRES(), BiCGStab(), Anderson(window=10)], ids=repr)
def test_condition_number_1e10_reaches_the_residual(adjoint):
    rates = 1 - torch.logspace(-10, 0, 6, dtype=torch.float64)
    c = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    z, solution = fixed_point(
        lambda z: rates * z + c,
        torch.zeros_like(c),
        solver=Anderson(window=8),
        adjoint=adjoint,
        tol=1e-11,
        max_iter=300,
        on_failure="ignore",
    )
    assert z.isfinite().all()
    assert (solution.residual <= 1e-9).all()
    (gradient,) = torch.autograd.grad(z.sum(), c)
    assert gradient.isfinite().all()
    residual = (1 + rates * gradient - gradient).norm(dim=1) / gradient.norm(dim=1)
    assert (residual <= 1e-9).all()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 5, 20])
def test_window_larger_than_the_state(size, window):
    a = 0.5 * torch.randn(size, size, dtype=torch.float64) / size
    b = torch.randn(4, size, dtype=torch.float64)
    z, solution = fixed_point(
        lambda z: torch.tanh(z @ a.T + b),
        torch.zeros_like(b),
        solver=Anderson(window=window),
        **TIGHT,
    )
    assert solution.converged.all()
    torch.testing.assert_close(z, torch.tanh(z @ a.T + b), rtol=0, atol=1e-11)


def test_ten_thousand_steps_through_the_ring_buffer():
    # A rotation: nonexpansive, its fixed point never reached by plain steps, and with a drifting
    # offset of one part in 1e3 per evaluation neither by accelerated ones.
    calls = [0]

    def wander(z):
        calls[0] += 1
        return torch.stack([-z[:, 1], z[:, 0]], 1) + 1 + 1e-3 * math.sin(calls[0])

    class Patient(Anderson):
        patience = 20_000

    with torch.no_grad():
        z, solution = fixed_point(
            wander,
            torch.zeros(2, 2, dtype=torch.float64),
            solver=Patient(window=3),
            tol=0.0,
            max_iter=10_000,
            on_failure="ignore",
        )
    assert calls[0] == 10_001
    assert z.isfinite().all()
    assert (solution.iterations == 10_000).all()
    torch.testing.assert_close(z, torch.tensor([[0.0, 1.0]] * 2, dtype=z.dtype), rtol=0, atol=1e-2)


def test_solver_objects_carry_nothing_from_one_solve_to_the_next():
    solver = Anderson(window=4)
    a = torch.randn(6, 6, dtype=torch.float64) / 6
    b = torch.randn(3, 6, dtype=torch.float64)
    f = lambda z: torch.tanh(z @ a.T + b)  # noqa: E731
    first, _ = fixed_point(f, torch.zeros_like(b), solver=solver)
    fixed_point(lambda z: torch.cos(z), b, solver=solver)
    again, _ = fixed_point(f, torch.zeros_like(b), solver=solver)
    assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_past_machine_precision_stagnates_calmly(dtype):
    a = torch.randn(8, 8, dtype=dtype) / 8
    b = torch.randn(5, 8, dtype=dtype)
    z, solution = fixed_point(
        lambda z: torch.tanh(z @ a.T + b),
        torch.zeros_like(b),
        solver="anderson",
        tol=1e-30,
        max_iter=500,
        on_failure="ignore",
    )
    # Either the iteration hits a state that rounds to itself, or it stops at the rounding floor.
    assert ((solution.status == Status.STAGNATED) | solution.converged).all()
    assert (solution.residual <= 10 * torch.finfo(dtype).eps).all()
    assert solution.iterations.max() < 200
    assert z.isfinite().all()


def test_noisy_floor_stops_at_the_noise():
    generator = torch.Generator().manual_seed(5)
    b = torch.randn(4, 16, dtype=torch.float64)

    def noisy(z):
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        return 0.5 * torch.tanh(z) + b + 1e-6 * noise

    _, solution = fixed_point(
        noisy,
        torch.zeros_like(b),
        solver="anderson",
        tol=1e-10,
        max_iter=2000,
        patience=50,
        on_failure="ignore",
    )
    assert (solution.status == Status.STAGNATED).all()
    assert (solution.residual <= 1e-5).all()


def test_neumann_and_gmres_refuse_the_forward_problem():
    for solver in ("neumann", "gmres", "bicgstab", Neumann(), GMRES(), BiCGStab()):
        with pytest.raises(ValueError, match=r"picard.*anderson"):
            fixed_point(torch.cos, torch.zeros(1, 1), solver=solver)


def test_damped_picard_converges_where_plain_diverges():
    f = lambda z: 2 - 3 * z  # noqa: E731  slope -3: the damped map has slope 1 - 4 * 0.3 = -0.2
    z, solution = fixed_point(f, torch.zeros(1, 1), solver=Picard(damping=0.3), tol=1e-5)
    assert solution.converged.all()
    assert z.item() == pytest.approx(0.5, rel=1e-4)
    _, plain = fixed_point(f, torch.zeros(1, 1), solver=Picard(), on_failure="ignore")
    assert not plain.converged.any()


def test_weight_cap_is_counted():
    rates = f64(0.9, 0.99, 0.999)
    capped = Anderson(window=3, max_weight=1e-3)
    _, solution = fixed_point(
        lambda z: rates * z + 1.0,
        torch.ones(2, 3, dtype=torch.float64),
        solver=capped,
        max_iter=20,
        on_failure="ignore",
    )
    assert (solution.rejects["weight_cap"] >= 10).all()
