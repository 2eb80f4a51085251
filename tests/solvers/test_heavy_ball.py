"""Heavy-ball steps: the rate that theory gives, any first guess, and both implementations alike."""

import math

import pytest
import torch
from engine_cases import Adjoint, Call
from symmetric_cases import IMPLEMENTATIONS, relative_residual, symmetric_cell, symmetric_weight

from fastdeq import DEQLayer, fixed_point
from fastdeq.backends import extension
from fastdeq.solution import Status
from fastdeq.solvers import Anderson, HeavyBall, Picard

RADII = [0.3, 0.5, 0.7, 0.9, 0.95, 0.98]
implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def rate(radius):
    """sqrt(omega - 1)"""
    return radius / (1 + math.sqrt(1 - radius**2))


def theory(radius, tol):
    """Steps after which ``rate^k (1 + k (1 - rate^2) / (1 + rate^2))``, what the polynomial of k
    steps with the right omega leaves of any eigenvalue at most, is below tol."""
    r = rate(radius)
    slope = (1 - r * r) / (1 + r * r)
    return next(k for k in range(10_000) if r**k * (1 + k * slope) <= tol)


@implementation
@pytest.mark.parametrize("radius", RADII)
def test_linear_rate(radius, implementation):
    """The residual has (1 - lambda) next to the error. Omega is right from the start; a fifth for
    the estimate, which can only rise."""
    case = symmetric_cell(16, 200, radius, torch.float64, "identity")
    for tol in (1e-4, 1e-8):
        outputs = getattr(case, implementation)(Call(HeavyBall(radius), tol, 1000))
        assert (outputs.status == Status.CONVERGED).all()
        spread = (1 + radius) / (1 - radius)  # |r_k| / |r_0| over |e_k| / |e_0|
        assert outputs.iterations.max() <= 1.2 * theory(radius, tol / spread) + 2
        assert (relative_residual(case, outputs.value) <= tol * (1 + 1e-6)).all()


@pytest.mark.parametrize("radius", RADII)
def test_the_polynomial_of_k_steps(radius):
    """One eigenvalue at a time, omega known: the scalar recurrence, to rounding."""
    values = torch.linspace(-radius, radius, 21, dtype=torch.float64)
    omega = 1 + rate(radius) ** 2
    error, before = values.clone(), torch.ones_like(values)  # of 1 after the plain first step
    for k in range(2, 40):
        error, before = before + omega * (values * error - before), error
        r = rate(radius)
        bound = r**k * (1 + k * (1 - r * r) / (1 + r * r))
        assert error.abs().max() <= bound * (1 + 1e-9)


@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("radius", [0.5, 0.9, 0.98])
def test_about_as_many_steps_as_anderson_acceleration(radius, activation):
    """Anderson acceleration of a linear map is GMRES, hence at best the rate above; 4/3 and 3 for
    a guess that is off."""
    case = symmetric_cell(32, 128, radius, torch.float64, activation)
    call = {"tol": 1e-6, "max_iter": 2000}
    mine, other, plain = (
        case.engine(Call(s, **call)).iterations.double().mean()
        for s in (HeavyBall(), Anderson(), Picard())
    )
    assert mine <= 4 / 3 * other + 3
    assert mine <= 1.25 * plain


@implementation
@pytest.mark.parametrize("guess", [0.0, 0.2, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("radius", [0.05, 0.5, 0.9, 0.99])
def test_converges_whatever_the_first_guess(radius, guess, implementation):
    """Never slower, in the long run, than the rate of the largest omega or of the radius."""
    case = symmetric_cell(9, 60, radius, torch.float64, "identity")
    tol = 1e-7
    outputs = getattr(case, implementation)(Call(HeavyBall(guess), tol, 1000))
    assert (outputs.status == Status.CONVERGED).all()
    slowest = theory(0.98, tol * (1 - radius) / (1 + radius))
    if radius > 0.98:  # omega (1 - radius) per step of the slowest eigenvalue
        omega = 1 + rate(0.98) ** 2
        top = (omega * radius + math.sqrt((omega * radius) ** 2 - 4 * (omega - 1))) / 2
        slowest = math.log(tol * (1 - radius) / 4) / math.log(top)
    assert outputs.iterations.max() <= 1.2 * slowest + 10


def test_an_eigenvalue_that_was_seen_raises_the_guess():
    case = symmetric_cell(9, 60, 0.95, torch.float64, "identity")
    poor, right = (
        case.engine(Call(HeavyBall(guess), 1e-8, 1000)).iterations.max() for guess in (0.0, 0.95)
    )
    assert poor <= 1.5 * right


@pytest.mark.parametrize("size", [2, 4, 8, 20])
@pytest.mark.parametrize("radius", [0.3, 0.5])
def test_small_cells_are_not_slower_than_with_plain_steps(radius, size):
    case = symmetric_cell(60, size, radius, torch.float64, "identity")
    mine, plain = (
        case.engine(Call(s, 1e-8, 1000)).iterations.double() for s in (HeavyBall(), Picard())
    )
    assert (mine <= 2 * plain + 5).all()


@pytest.mark.parametrize("radius", [0.3, 0.9, 0.98])
@pytest.mark.parametrize("activation", ["tanh", "identity", "relu", "softplus"])
def test_the_engine_takes_the_steps_of_the_reference(activation, radius):
    start = torch.randn(7, 33, dtype=torch.float64)
    case = symmetric_cell(7, 33, radius, torch.float64, activation, start)
    slope = torch.rand(7, 33, dtype=torch.float64)
    for c in (case, Adjoint(case.weight, slope, start)):
        for updates in (1, 2, 3, 8, 300):
            call = Call(HeavyBall(), 1e-9, updates)
            actual, expected = c.engine(call), c.reference(call)
            assert torch.equal(actual.status, expected.status)
            assert torch.equal(actual.iterations, expected.iterations)
            assert actual.rejects.shape == expected.rejects.shape == (7, 0)
            # Rounding is amplified by 1 / (1 - radius) at most, and by the steps of a transient.
            torch.testing.assert_close(actual.value, expected.value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_float32_and_mixed_precision_verified_in_float64(activation, precision):
    if precision == "mixed" and not extension.has_low_precision:
        pytest.skip("no low-precision products here")
    for radius in (0.5, 0.9, 0.97):
        case = symmetric_cell(40, 100, radius, torch.float32, activation)
        outputs = case.engine(Call(HeavyBall(), 1e-5, 300, precision))
        assert (outputs.status == Status.CONVERGED).all()
        noise = case.rounding(outputs.value, 2**-24) / outputs.value.double().norm(dim=1)
        assert (relative_residual(case, outputs.value) <= 1e-5 + noise).all()
        plain = case.engine(Call(HeavyBall(), 1e-5, 300, "float32"))
        assert outputs.iterations.max() <= plain.iterations.max() + 6


def test_general_maps_and_their_gradients():
    w = symmetric_weight(12, 0.9).requires_grad_()
    b = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    z, solution = fixed_point(
        lambda z: torch.tanh(z @ w.t() + b),
        torch.zeros(5, 12, dtype=torch.float64),
        solver="heavy_ball",
        adjoint=HeavyBall(0.8),
        tol=1e-12,
        max_iter=500,
    )
    assert solution.converged.all()
    d = 1 - z.detach() ** 2
    g = torch.randn_like(z)
    (grad,) = torch.autograd.grad((z * g).sum(), b)
    matrix = torch.eye(12, dtype=w.dtype) - d.unsqueeze(2) * w.detach()
    torch.testing.assert_close(grad, torch.linalg.solve(matrix, d * g), rtol=1e-9, atol=1e-9)


@implementation
def test_what_does_not_contract_ends_with_a_status(implementation):
    for radius in (1.5, 10.0):
        case = symmetric_cell(5, 30, radius, torch.float32, "identity")
        outputs = getattr(case, implementation)(Call(HeavyBall(), 1e-5, 500))
        assert (outputs.status != Status.CONVERGED).all()
        assert outputs.value.isfinite().all()
        assert outputs.iterations.max() <= 200


@implementation
def test_bad_samples_do_not_harm_the_others(implementation):
    case = symmetric_cell(5, 30, 0.9, torch.float64)
    good = getattr(case, implementation)(Call(HeavyBall(), 1e-9, 300))
    case.injection[1], case.injection[3, 2] = torch.nan, 1e30
    outputs = getattr(case, implementation)(Call(HeavyBall(), 1e-9, 300))
    assert outputs.status.tolist() == [0, Status.NONFINITE, 0, 0, 0]
    torch.testing.assert_close(outputs.value[::2], good.value[::2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("radius", [-0.1, 0.981, 1.0, float("nan"), float("inf")])
def test_a_radius_out_of_range(radius):
    with pytest.raises(ValueError, match=r"HeavyBall\(radius=.*in \[0, 0.98\]"):
        HeavyBall(radius)


def test_misspelt_options_and_names():
    with pytest.raises(TypeError, match="valid options: radius"):
        HeavyBall(radii=0.5)
    with pytest.raises(ValueError, match="Did you mean 'heavy_ball'"):
        DEQLayer(torch.cos, solver="heavyball")
