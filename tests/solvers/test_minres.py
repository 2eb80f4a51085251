"""MINRES for adjoints of symmetric cells: exact, definite or not, in both implementations."""

import pytest
import torch
from engine_cases import Adjoint, Call
from gradient_cases import as_function, make_cell, parameters_of, unrolled
from minres_cases import check_exact, slopes
from symmetric_cases import IMPLEMENTATIONS, adjoint_at, symmetric_cell, symmetric_weight

from fastdeq import AffineCell, DEQLayer
from fastdeq.activations import ACTIVATIONS
from fastdeq.solution import Status
from fastdeq.solvers import MINRES, Anderson, Energy, Neumann

implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
momentum = pytest.mark.parametrize("momentum", [False, True])
SLOPES = ["positive", "zeros and ones", "some zeros", "all ones"]


@implementation
@momentum
@pytest.mark.parametrize("kind", SLOPES)
@pytest.mark.parametrize("size", [1, 2, 3, 17, 64])
def test_equals_a_direct_solve(size, kind, momentum, implementation):
    for radius in (0.5, 0.95, 2.0, 4.0):
        w = symmetric_weight(size, radius)
        case = Adjoint(w, slopes(kind, 5, size), torch.randn(5, size, dtype=w.dtype))
        outputs = getattr(case, implementation)(Call(MINRES(momentum), 1e-11, 1000))
        assert (outputs.status == Status.CONVERGED).all()
        check_exact(case, outputs, 1e-11)
        assert (outputs.value[case.slope == 0] == 0).all()


@implementation
@momentum
@pytest.mark.parametrize("activation", ["relu", "hardtanh", "tanh", "sigmoid"])
def test_at_equilibria_of_cells(activation, momentum, implementation):
    scale = {"relu": 0.9, "sigmoid": 20.0}.get(activation, 3.0)
    forward = symmetric_cell(6, 48, scale, torch.float32, activation)
    case = adjoint_at(forward, forward.engine(Call(Energy(), 1e-5, 1000)).value)
    outputs = getattr(case, implementation)(Call(MINRES(momentum), 1e-5, 500))
    assert (outputs.status == Status.CONVERGED).all()
    check_exact(case, outputs, 1e-5)


def test_a_definite_system_needs_no_more_products_than_entries():
    """In exact arithmetic as many directions as I - hWh has eigenvalues, and one verification."""
    case = Adjoint(
        symmetric_weight(6, 0.9), slopes("positive", 4, 6), torch.randn(4, 6, dtype=torch.float64)
    )
    for implementation in IMPLEMENTATIONS:
        assert (getattr(case, implementation)(Call(MINRES(), 1e-12, 100)).iterations <= 6 + 2).all()


@implementation
@momentum
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gap", [0.0, 1e-14, 1e-8, 1e-3])
def test_singular_systems_end_with_a_true_status(gap, dtype, momentum, implementation):
    q, _ = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))
    values = torch.linspace(-2, 0.8, 30, dtype=torch.float64)
    values[-1] = 1 - gap
    w = (q * values) @ q.t()
    g = torch.randn(4, 30, dtype=torch.float64)
    g[0] = q[:, -1]  # no solution, where the gap is 0
    g[1] -= (g[1] @ q[:, -1]) * q[:, -1]  # one without a part in the null space
    case = Adjoint(((w + w.t()) / 2).to(dtype), torch.ones(4, 30, dtype=dtype), g.to(dtype))
    tol = 1e-4 if dtype == torch.float32 else 1e-6
    outputs = getattr(case, implementation)(Call(MINRES(momentum), tol, 1000))
    assert outputs.value.isfinite().all()
    assert torch.equal(outputs.status == Status.CONVERGED, outputs.residual <= tol)
    assert outputs.status[1] == Status.CONVERGED
    assert outputs.iterations.max() <= 200
    value = outputs.value.double() / case.scale()
    f = case.step(value)
    noise = case.rounding(value, torch.finfo(dtype).eps / 2) / f.norm(dim=1)
    true = (f - value).norm(dim=1) / f.norm(dim=1)
    assert (true <= outputs.residual * 1.01 + noise + 1e-6).all()


@implementation
@momentum
def test_a_scalar_equation(implementation, momentum):
    for w, expected in ((0.5, 2.0), (2.0, -1.0), (-3.0, 0.25), (0.0, 1.0)):
        case = Adjoint(torch.tensor([[w]]), torch.ones(2, 1), torch.tensor([[1.0], [2.0]]))
        value = getattr(case, implementation)(Call(MINRES(momentum), 1e-6, 100)).value
        torch.testing.assert_close(value, torch.tensor([[expected], [2 * expected]]))
    singular = Adjoint(torch.ones(1, 1), torch.ones(2, 1), torch.ones(2, 1))
    outputs = getattr(singular, implementation)(Call(MINRES(momentum), 1e-6, 100))
    assert (outputs.status != Status.CONVERGED).all()
    assert outputs.value.isfinite().all()


# Most products, as a part of those of Anderson(5), of the mean sample and of the slowest.
SAVED = {("tanh", 2.0): (0.7, 0.6), ("tanh", 4.0): (0.8, 0.65), ("identity", 0.99): (0.4, 0.4)}


@pytest.mark.parametrize(("activation", "scale"), SAVED)
def test_products_next_to_those_of_anderson_acceleration(activation, scale):
    forward = symmetric_cell(64, 256, scale, torch.float64, activation)
    case = adjoint_at(forward, forward.engine(Call(Energy(), 1e-10, 2000)).value)
    counts = [
        case.engine(Call(solver, 1e-6, 1000)).iterations.double()
        for solver in (MINRES(), Anderson(window=5))
    ]
    mean, most = SAVED[activation, scale]
    assert counts[0].mean() <= mean * counts[1].mean()
    assert counts[0].max() <= most * counts[1].max()


@implementation
def test_momentum_gives_way_where_plain_steps_diverge(implementation):
    case = Adjoint(
        symmetric_weight(40, 3.0),
        slopes("positive", 6, 40),
        torch.randn(6, 40, dtype=torch.float64),
    )
    assert (
        getattr(case, implementation)(Call(Neumann(), 1e-9, 200)).status != Status.CONVERGED
    ).all()
    outputs = getattr(case, implementation)(Call(MINRES(momentum=True), 1e-9, 200))
    assert (outputs.status == Status.CONVERGED).all()
    check_exact(case, outputs, 1e-9)
    plain = getattr(case, implementation)(Call(MINRES(), 1e-9, 200))
    # Six heavy-ball steps that do not halve, a few before them that may have, and a new start.
    assert (outputs.iterations <= plain.iterations + 6 + 6 + 2).all()


@momentum
@pytest.mark.parametrize("radius", [0.5, 0.95, 2.0])
def test_the_engine_takes_the_steps_of_the_reference(radius, momentum):
    for kind in SLOPES:
        case = Adjoint(
            symmetric_weight(33, radius),
            slopes(kind, 7, 33),
            torch.randn(7, 33, dtype=torch.float64),
        )
        for updates in (1, 2, 3, 6, 9, 14):
            call = Call(MINRES(momentum), 1e-12, updates)
            actual, expected = case.engine(call), case.reference(call)
            for name in ("status", "iterations", "rejects"):
                assert torch.equal(getattr(actual, name), getattr(expected, name)), (updates, name)
            torch.testing.assert_close(actual.value, expected.value, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(actual.residual, expected.residual, rtol=1e-7, atol=1e-13)


@implementation
@momentum
def test_rows_without_a_gradient_or_with_a_bad_one(implementation, momentum):
    case = Adjoint(
        symmetric_weight(20, 0.9), slopes("positive", 6, 20), torch.randn(6, 20).double()
    )
    good = getattr(case, implementation)(Call(MINRES(momentum), 1e-10, 200))
    grad, slope = case.grad.clone(), case.slope.clone()
    grad[0], grad[1, 3], grad[2, 4], slope[3] = 0.0, torch.nan, torch.inf, 0.0
    outputs = getattr(Adjoint(case.weight, slope, grad), implementation)(
        Call(MINRES(momentum), 1e-10, 200)
    )
    assert (outputs.value[[0, 3]] == 0).all()
    assert (outputs.status[[0, 3]] == Status.CONVERGED).all()
    assert outputs.value[[1, 2]].isnan().all()
    torch.testing.assert_close(outputs.value[4:], good.value[4:], rtol=1e-12, atol=1e-12)


@implementation
@momentum
def test_a_weight_with_nan_ends_nonfinite(implementation, momentum):
    w = symmetric_weight(8, 0.9)
    w[2, 3] = w[3, 2] = torch.nan
    case = Adjoint(w, slopes("positive", 3, 8), torch.randn(3, 8, dtype=torch.float64))
    outputs = getattr(case, implementation)(Call(MINRES(momentum), 1e-10, 200))
    assert (outputs.status == Status.NONFINITE).all()
    assert outputs.value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_gradients_of_any_size(size, dtype):
    grad = torch.randn(4, 20, dtype=dtype)
    w, d = symmetric_weight(20, 2.0, dtype), slopes("positive", 4, 20, dtype)
    call = Call(MINRES(), 1e-4, 200)
    for implementation in IMPLEMENTATIONS:
        one = getattr(Adjoint(w, d, grad), implementation)(call)
        other = getattr(Adjoint(w, d, grad * size), implementation)(call)
        assert torch.equal(one.status, other.status)
        torch.testing.assert_close(other.value / size, one.value, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("activation", ["tanh", "softplus", "hardtanh"])
@momentum
def test_layer_gradients(activation, momentum):
    cell = make_cell(activation, "symmetric", 0.7, n=3, d=4)
    layer = DEQLayer(cell, solver=Energy(), adjoint=MINRES(momentum), tol=1e-12, max_iter=500)
    names, values = parameters_of(cell)
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    run = as_function(layer, names)
    assert torch.autograd.gradcheck(run, (x, *values), atol=1e-6)
    if ACTIVATIONS[activation].smooth:
        assert torch.autograd.gradgradcheck(run, (x, *values), atol=1e-5)


def test_layer_gradients_are_those_of_the_unrolled_iteration():
    cell = AffineCell(5, 12, weight="symmetric", scale=0.8, dtype=torch.float64)
    layer = DEQLayer(cell, adjoint="minres", tol=1e-12, max_iter=500)
    x, g = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)
    implicit = torch.autograd.grad((layer(x) * g).sum(), list(cell.parameters()))
    through = torch.autograd.grad((unrolled(cell, x, 400) * g).sum(), list(cell.parameters()))
    for a, b in zip(implicit, through, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
