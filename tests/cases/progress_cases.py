"""What counts as progress of a solve, for every engine: ``solve(case, call)`` gives its Outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from engine_cases import Adjoint, Call, Forward, Outputs
from torch import Tensor

from fastdeq.solution import Status
from fastdeq.solvers import Anderson, HeavyBall, Picard, Solver

Solve = Callable[[Forward | Adjoint, Call], Outputs]


def rotation(size: int, scale: float, dtype: torch.dtype) -> Tensor:
    """scale times an orthogonal matrix without eigenvalues near 1."""
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    return (scale * q).to(dtype)


def norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows.double(), dim=1)


def check_shrinking(
    solve: Solve, solver: Solver, *, size=7, batch=3, scale=0.8, dtype=torch.float32
) -> None:
    """From a start far beyond the equilibrium the relative residual stands still for long."""
    w, c = rotation(size, scale, dtype), torch.randn(batch, size, dtype=dtype)
    start = 1e7 * torch.randn(batch, size, dtype=dtype)
    outputs = solve(Forward(w, c, "identity", start), Call(solver, tol=1e-3, max_iter=1000))
    assert outputs.status.tolist() == [Status.CONVERGED] * batch
    wide = torch.eye(size, dtype=torch.float64) - w.double().t()
    exact = torch.linalg.solve(wide, c.double(), left=False)
    # |z - z*| <= |f(z) - z| / (1 - s), and |f(z) - z| <= tol |f(z)|; |f(z)| <= 2 |z*|.
    assert (norms(outputs.value - exact) <= 2e-3 / (1 - scale) * norms(exact)).all()
    if isinstance(solver, Picard):
        assert (outputs.iterations > 50).all()  # that is, patience was put to the test


def check_falling_norms(solve: Solve) -> None:
    """Each step that brings a state closer is progress: with a patience of 4 its halves leave
    0.95^2 = 0.9025 of the norm, which alone would not do."""
    w, c = rotation(8, 0.95, torch.float32), torch.randn(3, 8)
    start = 1e3 * torch.randn(3, 8)
    outputs = solve(
        Forward(w, c, "identity", start), Call(Picard(), tol=1e-2, max_iter=400, patience=4)
    )
    assert outputs.status.tolist() == [Status.CONVERGED] * 3


def check_zero_equilibrium(solve: Solve, *, size=6, dtype=torch.float32) -> None:
    """Every step brings the state closer to zero; the last one is the best."""
    w, c = rotation(size, 0.8, dtype), torch.zeros(2, size, dtype=dtype)
    start = torch.randn(2, size, dtype=dtype)
    case = Forward(w, c, "identity", start)
    limited = solve(case, Call(Picard(), tol=1e-4, max_iter=70))
    assert limited.status.tolist() == [Status.MAX_ITER] * 2
    assert (norms(limited.value) <= 1.01 * 0.8**70 * norms(start)).all()
    ended = solve(case, Call(Picard(), tol=1e-4, max_iter=400))
    assert ended.status.tolist() == [Status.CONVERGED] * 2
    early = solve(case, Call(Picard(), tol=1e-4, max_iter=400, atol=1e-2))
    assert early.status.tolist() == [Status.CONVERGED] * 2
    assert (early.iterations < 40).all()


def check_absolute_tolerance(solve: Solve, solver: Solver, *, adjoint: bool = False) -> None:
    """The first iterate with ``|f(z) - z| <= atol + tol |f(z)|`` ends the solve: of plain steps all
    are known. An adjoint's rows are scaled to ``|D g| = 1``."""
    size, dtype = 6, torch.float32
    w, rows = rotation(size, 0.7, dtype), torch.randn(3, size, dtype=dtype)
    if isinstance(solver, HeavyBall):
        w = (w + w.t()) / 2
    rows = rows * torch.tensor([[1.0], [30.0], [0.05]])
    case = Adjoint(w, torch.ones_like(rows), rows) if adjoint else Forward(w, rows, "identity")
    scale = norms(rows) if adjoint else torch.ones(3, dtype=torch.float64)
    matrix = w.double() if adjoint else w.double().t()
    for tol, atol in ((0.0, 1e-2), (1e-3, 0.0), (1e-3, 2e-2)):
        outputs = solve(case, Call(solver, tol=tol, max_iter=60, atol=atol))
        assert outputs.status.tolist() == [Status.CONVERGED] * 3
        z, b = torch.zeros_like(rows, dtype=torch.float64), rows.double() / scale[:, None]
        count = torch.full((3,), -1)
        unsure = count >= 0  # rounding decides
        for k in range(61):
            value = z @ matrix + b
            limit = atol + tol * (norms(value) + 1e-9)
            near = (norms(value - z) / limit - 1).abs() < 1e-3
            unsure = unsure | (near & (count < 0))
            count = torch.where((count < 0) & (norms(value - z) <= limit), k, count)
            z = value
        if isinstance(solver, Picard):
            assert (unsure | (outputs.iterations == count)).all()
            assert unsure.sum() <= 1
        value = outputs.value.double() / scale[:, None]
        image = value @ matrix + b
        assert (norms(image - value) <= 1.001 * (atol + tol * norms(image)) + 1e-6).all()


def check_patience(solve: Solve) -> None:
    """z -> c - z swings between two points for ever; patience is 50 in 100, or as it is said."""
    w, c = -torch.eye(5), torch.randn(2, 5)
    case = Forward(w, c, "identity")
    for limit, patience, expected in ((100, None, 50), (400, None, 200), (100, 8, 8), (30, 40, 30)):
        outputs = solve(case, Call(Picard(), tol=1e-4, max_iter=limit, patience=patience))
        ended = Status.MAX_ITER if limit < 40 else Status.STAGNATED
        assert outputs.status.tolist() == [ended] * 2
        # Idle from the first or the second evaluation on; looked at every half of the patience.
        assert all(expected <= n <= 1.5 * expected + 2 for n in outputs.iterations.tolist())


def check_rounding_floor(solve: Solve, dtype=torch.float32) -> None:
    """A tolerance of zero is not waited for as long as a limit of 1000 would have it."""
    w, c = rotation(6, 0.5, dtype), torch.randn(8, 6, dtype=dtype)
    outputs = solve(Forward(w, c), Call(Picard(), tol=0.0, max_iter=1000))
    assert {*outputs.status.tolist()} <= {Status.STAGNATED, Status.CONVERGED}
    assert (outputs.iterations < 250).all()


def check_large_states(solve: Solve, solver: Solver, *, exponent=28.0) -> None:
    """Squares of the entries are beyond the range of float32, the state is not."""
    w, c = rotation(5, 0.5, torch.float32), torch.randn(3, 5)
    small = solve(Forward(w, c, "identity"), Call(solver, tol=1e-4, max_iter=60))
    large = solve(Forward(w, c * 10**exponent, "identity"), Call(solver, tol=1e-4, max_iter=60))
    assert large.status.tolist() == small.status.tolist() == [Status.CONVERGED] * 3
    assert (large.iterations - small.iterations).abs().max() <= 1
    torch.testing.assert_close(large.value / 10**exponent, small.value, rtol=1e-3, atol=1e-3)


def check_refill(solve: Solve, reference: Solve) -> None:
    """After a step taken back plain steps fill the history: the same counters and iterates as the
    reference, on a map whose acceleration overshoots."""
    torch.manual_seed(5)
    solver = Anderson(window=3, safeguard=1.0)
    w, c = 1.5 * torch.randn(12, 12) / 12**0.5, torch.randn(24, 12)
    for steps in (6, 12):
        call = Call(solver, tol=0.0, max_iter=steps)
        actual, expected = solve(Forward(w, c), call), reference(Forward(w, c), call)
        alike = (actual.rejects == expected.rejects).all(1)  # chaotic samples may part
        assert alike.float().mean() >= 0.8
        assert (expected.rejects[:, 0] > 0).any()
        near = norms(actual.value - expected.value) <= 1e-2 * norms(expected.value)
        assert near[alike].float().mean() >= 0.9


SOLVERS = (Picard(), Anderson(), Anderson(accelerate_above=0.9))
