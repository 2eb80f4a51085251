"""``precision="mixed"`` of general cells: early evaluations in bfloat16, results in float32."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastdeq import Anderson, BackendError, DEQLayer, Picard, Status, fixed_point
from fastdeq.backends import extension
from fastdeq.solvers import Step

BACKENDS = ["auto", "reference"]


class Cell(nn.Module):
    """tanh(scale A z + x) that keeps the dtypes of its products."""

    def __init__(self, size=32, scale=0.8):
        super().__init__()
        self.a = nn.Linear(size, size)
        nn.init.orthogonal_(self.a.weight)
        self.scale = scale
        self.dtypes = []

    def forward(self, z, x):
        product = self.a(z)
        self.dtypes.append(product.dtype)
        return torch.tanh(self.scale * product.to(x.dtype) + x)


def low(cell):
    return sum(dtype == torch.bfloat16 for dtype in cell.dtypes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["auto", "picard", Anderson(window=4)], ids=str)
def test_early_evaluations_are_in_bfloat16_and_the_result_is_not(solver, backend):
    if backend == "auto" and extension.module is None:
        pytest.skip(f"no compiled extension: {extension.why_missing}")
    cell, x = Cell(), torch.randn(9, 32)
    exact = Cell().double()
    exact.load_state_dict(cell.state_dict())
    with torch.no_grad():
        truth = DEQLayer(exact, tol=1e-12, max_iter=500)(x.double())
    tol = 1e-5
    layer = DEQLayer(cell, solver=solver, tol=tol, precision="mixed", backend=backend)
    with torch.no_grad():
        z = layer(x)
    solution = layer.last_solution
    assert solution.converged.all()
    # |z - z*| <= |f(z) - z| / (1 - 0.8), and the rounding of f in float32.
    error = (z - truth).norm(dim=1) / truth.norm(dim=1)
    assert error.max() <= 5 * (1.1 * tol + 1e-6)
    assert solution.narrow_evaluations == low(cell) >= 3
    assert cell.dtypes[0] == torch.float32  # what is cached then is exact
    assert cell.dtypes[-1] == torch.float32
    assert solution.evaluations == len(cell.dtypes)
    residual = (cell(z, x) - z).norm(dim=1) / cell(z, x).norm(dim=1)
    torch.testing.assert_close(residual, solution.residual, rtol=0.2, atol=1e-6)


def test_gradients_are_those_of_full_precision():
    """The adjoint is not in bfloat16. Errors of tol / (1 - L) in z and u, each."""
    cell, x = Cell(scale=0.6), torch.randn(7, 32)
    found = []
    for precision in ("auto", "mixed"):
        layer = DEQLayer(cell, tol=1e-6, precision=precision)
        cell.dtypes.clear()
        z = layer(x)
        found.append(torch.autograd.grad(z.square().sum(), list(cell.parameters())))
        assert layer.last_adjoint_solution.converged.all()
    assert low(cell) > 0
    for exact, mixed in zip(*found, strict=True):
        assert (exact - mixed).norm() <= 1e-4 * exact.norm()


def test_updates_stay_within_the_limit():
    cell, x = Cell(scale=0.999), torch.randn(4, 32)
    for limit in (1, 2, 3, 10, 31):
        layer = DEQLayer(
            cell, solver="picard", tol=1e-9, max_iter=limit, precision="mixed", on_failure="ignore"
        )
        with torch.no_grad():
            layer(x)
        assert layer.last_solution.iterations.max() <= limit
        assert (layer.last_solution.status == Status.MAX_ITER).all()


def test_a_fixed_count_is_kept():
    cell, x = Cell(scale=0.5), torch.randn(4, 32)
    for count in (1, 5, 12):
        cell.dtypes.clear()
        layer = DEQLayer(
            cell, solver=Picard(fixed_iterations=count), precision="mixed", on_failure="ignore"
        )
        with torch.no_grad():
            layer(x)
        assert layer.last_solution.iterations.tolist() == [count] * 4
        assert low(cell) == count // 2


def test_a_bad_sample_does_not_harm_the_others():
    class Blows(Cell):
        def forward(self, z, x):
            return super().forward(z, x) + torch.where(x[:, :1] > 50, torch.inf, 0.0)

    cell, x = Blows(), torch.randn(6, 32)
    x[2, 0] = 100.0
    x[4, 1] = torch.nan
    layer = DEQLayer(cell, precision="mixed", on_failure="ignore")
    with torch.no_grad():
        z = layer(x)
        good = [0, 1, 3, 5]
        expected = DEQLayer(cell, on_failure="ignore")(x[good])
    assert layer.last_solution.status[[2, 4]].tolist() == [Status.NONFINITE] * 2
    assert layer.last_solution.converged[good].all()
    torch.testing.assert_close(z[good], expected, atol=2e-3, rtol=2e-3)


def test_finished_samples_are_left_out_of_both_parts():
    class Gains(Cell):
        def forward(self, z, x, gain):
            return super().forward(gain * z, x)

    cell, x = Gains(scale=1.0), 0.1 * torch.randn(16, 32)
    gain = torch.full((16, 1), 0.3)
    gain[3] = 0.97
    results = []
    for compact in (False, True):
        layer = DEQLayer(cell, tol=1e-5, max_iter=400, precision="mixed", compact=compact)
        with torch.no_grad():
            results.append(layer(x, gain))
    solution = layer.last_solution
    assert "left out" in solution.path
    assert solution.sample_evaluations < 0.6 * 16 * solution.evaluations
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)


def test_cached_parametrisations_stay_exact():
    cell, x = Cell(scale=0.7), torch.randn(3, 32)
    parametrizations.orthogonal(cell.a)
    with torch.no_grad():
        expected = DEQLayer(cell, tol=1e-6)(x)
        with parametrize.cached():
            found = DEQLayer(cell, tol=1e-6, precision="mixed")(x)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_float64_is_refused():
    with pytest.raises(BackendError, match="float64"):
        fixed_point(torch.cos, torch.zeros(2, 3, dtype=torch.float64), precision="mixed")


@pytest.mark.parametrize("how", ["half-precision states", "autocast"])
def test_what_is_in_bfloat16_already_is_left_as_it_is(how):
    cell, x = Cell(), torch.randn(5, 32)
    layer = DEQLayer(cell, tol=2e-2, precision="mixed")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(x.bfloat16() if how != "autocast" else x)
    assert layer.last_solution.narrow_evaluations == 0
    assert layer.last_solution.converged.all()


def test_tuples_and_other_options():
    a, b = torch.randn(4, 8), torch.randn(4, 3)
    mix = torch.randn(3, 8) / 8

    def f(z):
        return torch.tanh(z[1] @ mix + a), 0.5 * torch.tanh(z[0] @ mix.t()).float() + b

    z0 = (torch.zeros(4, 8), torch.zeros(4, 3))
    exact, _ = fixed_point(f, z0, tol=1e-6)
    found, solution = fixed_point(f, z0, tol=1e-6, precision="mixed")
    assert solution.narrow_evaluations > 0
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_no_samples():
    with torch.no_grad():
        layer = DEQLayer(Cell(), precision="mixed", compact=True)
        assert layer(torch.zeros(0, 32)).shape == (0, 32)


def test_a_solver_of_ones_own_with_a_count():
    class Own:
        name, linear, needs, patience, rejects = "own", False, frozenset(), 50, ()
        fixed_iterations = 6

        def init(self, point, problem):
            return None

        def step(self, state, point, value, norm, running):
            return Step(value, None, ~norm.isfinite())

        def counters(self, state):
            return ()

    cell, x = Cell(scale=0.5), torch.randn(4, 32)
    with torch.no_grad():
        DEQLayer(cell, solver=Own(), precision="mixed", max_iter=10, on_failure="ignore")(x)
    assert len(cell.dtypes) == 7


@pytest.mark.parametrize("scale", [0.5, 0.8, 0.9])
def test_full_precision_takes_over_where_bfloat16_ends(scale):
    """At the first evaluation whose residuals are all within 2**-7."""
    worst = []

    class Watched(Cell):
        def forward(self, z, x):
            value = super().forward(z, x)
            residual = (value - z).norm(dim=1) / value.norm(dim=1)
            worst.append((self.dtypes[-1], float(residual.max())))
            return value

    with torch.no_grad():
        layer = DEQLayer(Watched(scale=scale), solver="picard", tol=1e-6, precision="mixed")
        layer(torch.randn(9, 32))
    in_bfloat16 = [residual for dtype, residual in worst if dtype == torch.bfloat16]
    assert len(in_bfloat16) >= 3
    assert min(in_bfloat16[:-1]) > 2**-7 >= in_bfloat16[-1]
