"""BiCGStab for adjoints: against direct solves, its breakdowns, and one bad sample."""

import pytest
import torch

from fastdeq import AffineCell, BackendError, BiCGStab, DEQLayer, Status, fixed_point
from fastdeq.solvers import loop

F64 = {"dtype": torch.float64}


def solve(matrix, b, tol=1e-10, max_iter=400, watch=None):
    """``u = b + J u`` for rows, J = I - matrix."""

    def f(u):
        value = b + u - u @ matrix.to(u.dtype).t()
        if watch is not None:
            watch.append((u.clone(), value))
        return value

    start = torch.zeros_like(b)
    return loop.solve(f, start, BiCGStab(), tol=tol, max_iter=max_iter, anderson_mix=None)


def error_and_bound(matrix, b, solution, tol):
    """``|u - u*| <= |A^-1| |r|`` and ``|r| <= tol |f(u)|``, with the rounding of a product."""
    exact = torch.linalg.solve(matrix, b.double().unsqueeze(2)).squeeze(2)
    u = solution.value.double()
    size = (b + u - u @ matrix.t()).norm(dim=1)
    noise = torch.finfo(b.dtype).eps * (1 + torch.linalg.matrix_norm(matrix)) * u.norm(dim=1)
    inverse = torch.linalg.matrix_norm(torch.linalg.inv(matrix), 2)
    return (u - exact).norm(dim=1), inverse * (1.01 * tol * size + noise)


def systems(kind, size):
    eye = torch.eye(size, **F64)
    gauss = torch.randn(size, size, **F64) / size**0.5
    q = torch.linalg.qr(gauss)[0]
    return {
        "gauss": eye - 0.9 * gauss,
        "rotation": eye - 0.9 * q,
        "near one": eye - 0.999 * (q * torch.linspace(-1, 1, size, **F64)) @ q.t(),
        "negative": eye + 4 * gauss @ gauss.t(),
    }[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["gauss", "rotation", "near one", "negative"])
@pytest.mark.parametrize("size", [1, 2, 33])
def test_equals_a_direct_solve(size, kind, dtype):
    matrix, b = systems(kind, size), torch.randn(6, size, dtype=dtype)
    tol = 1e-5 if dtype == torch.float32 else 1e-11
    solution = solve(matrix, b, tol)
    assert solution.converged.all()
    error, bound = error_and_bound(matrix, b, solution, tol)
    assert (error <= bound).all()


def test_the_iterates_are_those_of_the_method():
    """One sample beside van der Vorst's algorithm: the directions that are multiplied."""
    size = 9
    matrix, b = systems("gauss", size), torch.randn(1, size, **F64)
    seen = []
    solve(matrix, b, 1e-12, 13, seen)
    r = shadow = p = b[0]
    directions = []
    for _ in range(5):
        v = matrix @ p
        alpha = (shadow @ r) / (shadow @ v)
        s = r - alpha * v
        t = matrix @ s
        omega = (t @ s) / (t @ t)
        directions += [p, s]
        following = s - omega * t
        beta = (shadow @ following) / (shadow @ r) * alpha / omega
        r, p = following, following + beta * (p - omega * v)
    for (u, _), direction in zip(seen[1:], directions, strict=False):
        torch.testing.assert_close(u[0] / u.norm(), direction / direction.norm(), rtol=0, atol=1e-8)


def test_no_more_products_than_twice_the_dimensions():
    matrix, b = systems("gauss", 12), torch.randn(8, 12, **F64)
    solution = solve(matrix, b, 1e-8)
    assert (solution.iterations <= 2 * 12 + 2).all()
    assert (solution.rejects["restarts"] == 0).all()


def test_a_breakdown_starts_again_with_another_shadow():
    """b^T A b = 0 for the first sample: the first denominator is zero."""
    matrix = torch.tensor([[0.0, 1.0], [1.0, 0.0]], **F64)
    b = torch.tensor([[1.0, 0.0], [1.0, 1.0]], **F64)
    solution = solve(matrix, b, 1e-10, 40)
    assert solution.converged.all()
    assert solution.rejects["restarts"].tolist() == [1, 0]
    torch.testing.assert_close(solution.value, b.flip(1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["skew", "zero"])
def test_what_cannot_be_solved_ends_calmly(kind):
    """omega is zero for a skew matrix, at every step; the best iterate comes back."""
    k = torch.randn(8, 8, **F64)
    matrix = {"skew": k - k.t(), "zero": 0 * k}
    b = torch.randn(4, 8, **F64)
    solution = solve(matrix[kind], b, 1e-10, 300)
    assert not solution.converged.any()
    assert (solution.status != Status.NONFINITE).all()
    assert solution.value.isfinite().all()
    assert (solution.residual <= 1 + 1e-12).all()  # no worse than zero, whose value is b


def test_a_zero_right_hand_side_and_a_short_budget():
    matrix, b = systems("gauss", 5), torch.randn(3, 5, **F64)
    b[1] = 0
    assert torch.equal(solve(matrix, b).value[1], torch.zeros(5, **F64))
    for budget in range(1, 8):
        seen = []
        solution = solve(matrix, b, 1e-14, budget, seen)
        assert len(seen) == budget + 1
        u = solution.value
        value = b + u - u @ matrix.t()
        true = (value - u).norm(dim=1) / (value.norm(dim=1) + 1e-9)
        torch.testing.assert_close(solution.residual, true)
    assert (solution.residual < 0.5).all()


def test_more_products_are_never_worse():
    """Residuals of BiCGStab jump; what comes back is the least of those that were passed."""
    matrix, b = systems("near one", 40), torch.randn(8, 40, **F64)
    before = b.norm(dim=1)
    for budget in range(2, 40):
        u = solve(matrix, b, 1e-14, budget).value
        norm = (b - u @ matrix.t()).norm(dim=1)
        assert (norm <= before * (1 + 1e-9)).all()
        before = norm


def test_a_bad_sample_harms_no_other():
    matrix, b = systems("gauss", 16), torch.randn(5, 16, **F64)
    good = solve(matrix, b)
    for entry in (torch.nan, 1e200):
        poisoned = b.clone()
        poisoned[2] = entry
        bad = solve(matrix, poisoned)
        others = [0, 1, 3, 4]
        assert torch.equal(good.value[others], bad.value[others])
        assert torch.equal(good.iterations[others], bad.iterations[others])
        assert bad.value.isfinite().all()


@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
def test_gradients_of_affine_cells(weight):
    cell = AffineCell(4, 16, weight=weight, scale=0.9).double()
    x = torch.randn(6, 4, **F64)
    grads = []
    for adjoint in ("bicgstab", "gmres"):
        layer = DEQLayer(cell, adjoint=adjoint, tol=1e-11, max_iter=1000)
        grads.append(torch.autograd.grad(layer(x).square().sum(), list(cell.parameters())))
        assert layer.last_adjoint_solution.converged.all()
    for mine, other in zip(*grads, strict=True):
        assert (mine - other).norm() <= 1e-8 * other.norm()


def test_it_is_for_adjoints_and_in_plain_pytorch():
    with pytest.raises(ValueError, match="adjoint='bicgstab'"):
        fixed_point(torch.cos, torch.zeros(1, 1), solver="bicgstab")
    layer = DEQLayer(AffineCell(3, 4, scale=0.9), adjoint="bicgstab", backend="cpp")
    with pytest.raises(BackendError, match="no solver 'bicgstab'"):
        layer(torch.randn(2, 3))


def test_a_tolerance_that_a_small_part_does_not_meet_is_tightened():
    """The recurrence sees all of a state: with a fixed goal it would return after each product."""
    rates = torch.linspace(0.0, 0.95, 20, requires_grad=True, **F64)
    start = (torch.zeros(2, 3, **F64), torch.zeros(2, 20, **F64))
    seen = []
    (x, y), _ = fixed_point(
        lambda state: (0.1 * state[0] + 9e5, rates * state[1] + 1.0),
        start,
        on_solution=lambda _, solution: seen.append(solution),
        tol=1e-8,
        adjoint_tol=1e-4,
        max_iter=500,
        adjoint="bicgstab",
    )
    (1e6 * x.sum() + y.sum()).backward()
    assert seen[1].converged.all()
    assert (seen[1].rejects["restarts"] <= 8).all()
