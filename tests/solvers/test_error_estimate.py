"""The error that is estimated from the contraction that plain steps showed."""

import pytest
import torch

from fastdeq import AffineCell, DEQLayer, Neumann, Picard, fixed_point
from fastdeq.solvers import loop

DOUBLE = torch.float64


def linear(scale, size=12, kind="rotation"):
    """z -> z W^T + c and its fixed point."""
    w = torch.randn(size, size, dtype=DOUBLE)
    w = torch.linalg.qr(w)[0] if kind == "rotation" else (w + w.t()) / 2
    w = scale * w / torch.linalg.matrix_norm(w, 2)
    c = torch.randn(3, size, dtype=DOUBLE)
    exact = torch.linalg.solve(torch.eye(size, dtype=DOUBLE) - w.t(), c, left=False)
    return (lambda z: z @ w.t() + c), exact


@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("scale", [0.5, 0.9, 0.99])
def test_of_a_slow_real_direction_the_estimate_is_the_error(scale, damping):
    """At last the slowest direction is left, and the error is the residual over 1 - s, damped or
    not."""
    f, exact = linear(scale, kind="symmetric")
    if scale == 0.99:  # a gap to the next direction, so that it is left in time
        g, c = torch.tensor([0.99, 0.5, -0.3], dtype=DOUBLE), torch.randn(3, 3, dtype=DOUBLE)
        f, exact = (lambda z: z * g + c), c / (1 - g)
    options = {"solver": Picard(damping=damping), "tol": 1e-9, "max_iter": 5000}
    z, solution = fixed_point(f, torch.zeros_like(exact), **options)
    error = (z - exact).norm(dim=1)
    ratio = solution.error_estimate / error
    assert ((ratio > 0.5) & (ratio < 2)).all()
    assert (solution.observed_contraction < 1).all()


def test_of_a_rotation_it_is_an_upper_bound_within_the_geometry():
    """|I - W| is at most 1 + s: the error is between the residual over 1 + s and over 1 - s."""
    f, exact = linear(0.9)
    z, solution = fixed_point(f, torch.zeros_like(exact), solver="picard", tol=1e-6, max_iter=500)
    torch.testing.assert_close(
        solution.observed_contraction, torch.full((3,), 0.9, dtype=DOUBLE), rtol=1e-3, atol=0
    )
    error = (z - exact).norm(dim=1)
    assert (error <= 1.001 * solution.error_estimate).all()
    assert (error >= solution.error_estimate * 0.1 / 1.9).all()


def test_each_sample_has_its_own_rate_from_its_own_last_steps():
    rates = torch.tensor([[0.2], [0.9], [0.6]], dtype=DOUBLE)
    start = torch.zeros(3, 4, dtype=DOUBLE)
    solution = fixed_point(lambda z: rates * z + 1, start, solver="picard", max_iter=500)[1]
    torch.testing.assert_close(solution.observed_contraction, rates[:, 0], rtol=1e-6, atol=0)


def test_where_nothing_was_seen():
    start = torch.zeros(2, 3)
    run = {"on_failure": "ignore", "max_iter": 30}
    assert fixed_point(lambda z: 0.5 * z + 1, start, **run)[1].error_estimate is None
    grows = fixed_point(lambda z: 2 * z + 1, start, solver="picard", **run)[1]
    assert grows.error_estimate.isnan().all()
    at_once = fixed_point(lambda z: z, start, solver="picard")[1]
    assert at_once.observed_contraction.isnan().all()
    layer = DEQLayer(AffineCell(3, 4, scale=0.5), solver="picard")
    layer(torch.randn(2, 3))
    assert layer.last_solution.error_estimate is None
    pair = fixed_point(lambda s: (0.5 * s[0], 0.5 * s[1]), (start, start), solver="picard")[1]
    assert pair.error_estimate is None


def test_an_adjoint_by_plain_steps_shows_it_as_well():
    def adjoint(u):
        return 0.7 * u + 1

    solution = loop.solve(
        adjoint, torch.zeros(2, 3), Neumann(), tol=1e-4, max_iter=50, anderson_mix=None
    )
    torch.testing.assert_close(
        solution.observed_contraction, torch.full((2,), 0.7), rtol=1e-3, atol=0
    )
