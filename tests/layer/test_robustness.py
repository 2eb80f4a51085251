"""Edges, dtypes and failures: each has a defined outcome."""

import warnings

import pytest
import torch
from layer_cases import Residual, affine, every_solver

from fastdeq import (
    GMRES,
    ConvergenceError,
    ConvergenceWarning,
    DEQLayer,
)

# --- edges -----------------------------------------------------------------------------------


@every_solver
def test_one_iteration_is_one_application_of_the_cell(make_layer, solver):
    layer = make_layer(solver=solver, max_iter=1, on_failure="ignore")
    x = torch.randn(3, 6)
    z = layer(x)
    torch.testing.assert_close(z, layer.cell(torch.zeros(3, 6), x))
    assert layer.last_solution.iterations.tolist() == [1, 1, 1]
    z.sum().backward()


@pytest.mark.parametrize("adjoint", ["neumann", "gmres", "anderson", "broyden", "bicgstab"])
def test_one_adjoint_iteration(make_layer, adjoint):
    layer = make_layer(adjoint=adjoint, adjoint_max_iter=1, on_failure="ignore")
    layer(torch.randn(3, 6)).sum().backward()
    assert (layer.last_adjoint_solution.iterations <= 1).all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_gmres_spends_a_short_budget_on_an_iterate():
    cell = affine(d=40, scale=1.0)
    layer = DEQLayer(
        cell, adjoint=GMRES(restart=20), adjoint_max_iter=6, adjoint_tol=1e-9, on_failure="ignore"
    )
    layer(torch.randn(3, 6)).sum().backward()
    solution = layer.last_adjoint_solution
    assert (solution.residual < 0.5).all()


@every_solver
def test_empty_batch(make_layer, solver):
    layer = make_layer(solver=solver)
    x = torch.randn(0, 6, requires_grad=True)
    z = layer(x)
    assert z.shape == (0, 6)
    assert layer.last_solution.status.shape == (0,)
    z.sum().backward()
    assert x.grad.shape == (0, 6)
    assert "0 samples" in repr(layer.last_solution)


@every_solver
def test_single_feature(solver):
    layer = DEQLayer(affine(1, 1), solver=solver)
    layer(torch.randn(4, 1)).sum().backward()
    assert layer.last_solution.converged.all()


@every_solver
def test_start_at_the_solution_takes_no_iteration(make_layer, solver):
    layer = make_layer(solver=solver, tol=1e-3)
    x = torch.randn(3, 6)
    z = layer(x)
    layer(x, z0=z)
    assert layer.last_solution.iterations.tolist() == [0, 0, 0]


@every_solver
def test_samples_do_not_depend_on_their_batch(solver):
    # In float64: the last bits of a product depend on the batch it is part of.
    layer = DEQLayer(affine(d=32, weight="orthogonal", scale=0.9).double(), solver=solver)
    x = torch.randn(8, 6, dtype=torch.float64)
    together, iterations = layer(x), layer.last_solution.iterations
    for i in range(8):
        alone = layer(x[i : i + 1])
        assert layer.last_solution.iterations[0] == iterations[i]
        torch.testing.assert_close(alone[0], together[i], rtol=1e-6, atol=1e-6)


# --- dtypes ----------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_the_affine_cell(dtype, solver):
    layer = DEQLayer(affine(weight="orthogonal").to(dtype), solver=solver)
    x = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    z = layer(x)
    assert z.dtype == dtype
    # Narrow input is solved to a float32 residual.
    assert layer.last_solution.residual.dtype == (
        torch.float64 if dtype.itemsize == 8 else torch.float32
    )
    assert layer.last_solution.converged.all()
    z.sum().backward()
    assert x.grad.dtype == dtype
    w, c = layer.cell.recurrent_weight().double(), layer.cell.inject(x).double()
    exact = torch.zeros_like(c)
    for _ in range(300):
        exact = torch.tanh(exact @ w.T + c)
    # The residual 1e-4 over 1 - |W| <= 1 - 0.7 (rounded W: |W| < 0.72), then rounding to the dtype.
    allowed = (1e-4 / 0.28 + torch.finfo(dtype).eps) * exact.norm(dim=1)
    assert ((z.double() - exact).norm(dim=1) <= allowed).all()


def test_general_cell_in_bfloat16():
    layer = DEQLayer(Residual().bfloat16(), tol=2e-2)
    z = layer(torch.randn(4, 6, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16
    z.sum().backward()
    assert layer.last_solution.converged.all()


@pytest.mark.parametrize("kind", ["fused", "general"])
def test_autocast(kind):
    cell = affine() if kind == "fused" else Residual()
    layer = DEQLayer(cell, tol=1e-4 if kind == "fused" else 2e-2)
    x = torch.randn(4, 6)
    exact = DEQLayer(cell, tol=1e-6)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
    z.float().sum().backward()  # outside autocast: the gradient follows the forward's state
    assert layer.last_solution.converged.all()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in layer.parameters())
    # bfloat16 rounds the injection by 2^-8, which the inverse of 1 - 0.9 enlarges at most tenfold.
    assert ((z.float() - exact).norm(dim=1) <= 0.08 * exact.norm(dim=1).clamp(min=1)).all()


# --- failure policy --------------------------------------------------------------------------


def hard_layer(**options):
    return DEQLayer(affine(6, 32, scale=8.0), max_iter=5, **options)


def test_warns_once_per_layer():
    layer = hard_layer()
    x = torch.randn(3, 6)
    with pytest.warns(
        ConvergenceWarning, match=r"3 of 3 samples did not converge \(sample \d: MAX_ITER"
    ):
        z = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    with pytest.warns(ConvergenceWarning, match="adjoint"):
        z.sum().backward()
    with pytest.warns(ConvergenceWarning):
        hard_layer()(x)


def test_raise_names_the_worst_and_what_to_try():
    with pytest.raises(
        ConvergenceError, match=r"sample \d.*residual.*To try: raise max_iter"
    ) as caught:
        hard_layer(on_failure="raise")(torch.randn(3, 6))
    assert caught.value.solution.status.shape == (3,)


def test_raise_also_from_the_backward_pass():
    layer = DEQLayer(
        affine(6, 32, scale=0.9), adjoint_max_iter=2, adjoint_tol=1e-9, on_failure="raise"
    )
    z = layer(torch.randn(3, 6))
    with pytest.raises(ConvergenceError, match="adjoint"):
        z.sum().backward()


def test_the_best_iterate_is_returned_not_the_last():
    """The map is chaotic: float64 and few steps, so that rounding (1e-16, times 6 for each of 12
    steps at most, 2e-7) does not decide."""
    layer = DEQLayer(affine(6, 32, scale=6.0), max_iter=12, solver="picard", on_failure="ignore")
    layer.double()
    x = torch.randn(4, 6, dtype=torch.float64)
    z = layer(x)
    residual = layer.cell(z, x) - z
    relative = residual.norm(dim=1) / layer.cell(z, x).norm(dim=1)
    torch.testing.assert_close(relative, layer.last_solution.residual, rtol=1e-6, atol=1e-8)
    residuals, state = [], torch.zeros(4, 32, dtype=torch.float64)
    for _ in range(13):
        following = layer.cell(state, x)
        residuals.append((following - state).norm(dim=1) / following.norm(dim=1))
        state = following
    best = torch.stack(residuals).amin(0)
    torch.testing.assert_close(layer.last_solution.residual, best, rtol=1e-5, atol=1e-6)
