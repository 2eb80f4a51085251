"""Iteration counts known in advance and error bounds of maps that contract for certain."""

import math

import pytest
import torch
from engine_cases import Call, Forward
from symmetric_cases import IMPLEMENTATIONS

from fastdeq import AffineCell, Anderson, DEQLayer, Neumann, Picard, Solution, fixed_point
from fastdeq.activations import ACTIVATIONS
from fastdeq.solution import Status
from fastdeq.solvers.picard import certified_iterations

NONEXPANSIVE = [name for name, phi in ACTIVATIONS.items() if phi.nonexpansive]
SCALES = [0.5, 0.8, 0.9, 0.95, 0.99]
implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
scales = pytest.mark.parametrize("scale", SCALES)
BACKENDS = {"engine": "auto", "reference": "reference"}


def orthogonal_cell(scale, activation="tanh", d=24, dtype=torch.float64, n=5):
    return AffineCell(n, d, activation=activation, weight="orthogonal", scale=scale, dtype=dtype)


def worst_case(scale, dtype=torch.float64, size=6):
    """z = -s z + c: errors change sign, so that with an odd number of steps |f(z)| is at its least
    where the residual is at its largest."""
    return Forward(
        -scale * torch.eye(size, dtype=dtype), torch.randn(4, size, dtype=dtype), "identity"
    )


@implementation
@scales
@pytest.mark.parametrize("activation", NONEXPANSIVE)
def test_the_certified_count_meets_the_tolerance_without_a_stop_test(
    activation, scale, implementation
):
    cell = orthogonal_cell(scale, activation)
    for tol in (1e-3, 1e-6):
        layer = DEQLayer(
            cell,
            solver=Picard(fixed_iterations="certified"),
            adjoint=Neumann(fixed_iterations="certified"),
            tol=tol,
            adjoint_tol=10 * tol,
            max_iter=2,  # which it does not look at
            backend=BACKENDS[implementation],
            on_failure="raise",
        )
        x = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
        z = layer(x)
        torch.autograd.grad(z.sum(), x)
        slope = scale * ACTIVATIONS[activation].lipschitz
        for solution, limit in (
            (layer.last_solution, tol),
            (layer.last_adjoint_solution, 10 * tol),
        ):
            assert (solution.iterations == certified_iterations(slope, limit)).all()
            assert (solution.status == Status.CONVERGED).all()
            assert (solution.residual <= limit).all()
        f = cell(z, x)
        assert ((f - z).norm(dim=1) <= tol * f.norm(dim=1)).all()


@implementation
@scales
@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-8])
def test_the_count_is_tight(tol, scale, implementation):
    """On the worst case one or two steps fewer are too few: with an odd number the bound is met."""
    count = certified_iterations(scale, tol)
    case = worst_case(scale)
    enough = getattr(case, implementation)(Call(Picard(fixed_iterations=count), tol, 10))
    assert (enough.status == Status.CONVERGED).all()
    fewer = count - 1 if count % 2 == 0 else count - 2
    if fewer >= 1:
        short = getattr(case, implementation)(Call(Picard(fixed_iterations=fewer), tol, 10))
        assert (short.status == Status.MAX_ITER).all()
        assert (short.iterations == fewer).all()
        exact = (1 + scale) * scale**fewer / (1 - scale ** (fewer + 1))
        torch.testing.assert_close(short.residual, torch.full_like(short.residual, exact))


@implementation
def test_float32_meets_it_too(implementation):
    for scale in SCALES:
        layer = DEQLayer(
            orthogonal_cell(scale, "identity", dtype=torch.float32),
            solver=Picard(fixed_iterations="certified"),
            tol=1e-4,
            backend=BACKENDS[implementation],
            on_failure="raise",
        )
        layer(torch.randn(9, 5))


@implementation
@pytest.mark.parametrize("solver", [Picard(fixed_iterations=7), Picard(0.5, 7)], ids=repr)
def test_a_fixed_number_is_that_number_whatever_the_residual(solver, implementation):
    for case in (
        Forward(torch.zeros(3, 3), torch.ones(2, 3)),  # solved after one
        Forward(-0.9 * torch.eye(3), torch.ones(2, 3)),
        Forward(-1.5 * torch.eye(3), torch.ones(2, 3), "identity"),  # runs away
    ):
        outputs = getattr(case, implementation)(Call(solver, 1e-6, 3))
        assert (outputs.iterations == 7).all()
        assert torch.equal(outputs.status == Status.CONVERGED, outputs.residual <= 1e-6)
    bad = torch.ones(2, 3)
    bad[1, 0] = torch.nan
    outputs = getattr(Forward(0.3 * torch.eye(3), bad), implementation)(Call(solver, 1e-1, 3))
    assert outputs.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert outputs.iterations[0] == 7


def test_general_maps_take_a_fixed_number_of_evaluations():
    calls = []

    def f(z):
        calls.append(None)
        return torch.cos(z)

    with torch.no_grad():
        _, solution = fixed_point(
            f, torch.zeros(3, 2), solver=Picard(fixed_iterations=30), tol=1e-3, max_iter=2
        )
    assert len(calls) == 31
    assert (solution.iterations == 30).all()
    assert solution.converged.all()


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("scale", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_the_count_is_the_least_for_which_the_bound_holds(scale, tol):
    def bound(k):
        return (1 + scale) * scale**k / (1 - scale ** (k + 1))

    count = certified_iterations(scale, tol)
    assert count >= 1
    assert bound(count) <= tol * (1 + 1e-12)
    assert count == 1 or bound(count - 1) > tol * (1 - 1e-12)


@pytest.mark.parametrize(
    ("scale", "tol"), [(1.0, 1e-3), (-0.1, 1e-3), (0.5, 0.0), (0.9999999, 1e-9)]
)
def test_no_count_exists(scale, tol):
    with pytest.raises(ValueError, match="certified iteration count"):
        certified_iterations(scale, tol)


def exact_solution(weight, c, activation):
    """z* in float64, to rounding: the map contracts."""
    phi, w, c = ACTIVATIONS[activation].function, weight.double(), c.double()
    if activation == "identity":
        return torch.linalg.solve(torch.eye(len(w), dtype=w.dtype) - w, c.t()).t()
    z = torch.zeros_like(c)
    for _ in range(4000):
        z = phi(torch.addmm(c, z, w.t()))
    return z


@scales
@pytest.mark.parametrize("activation", ["identity", "tanh", "relu", "hardtanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", ["picard", "anderson", "heavy_ball"])
def test_the_error_bound_holds(solver, dtype, activation, scale):
    cell = orthogonal_cell(scale, activation, dtype=dtype, d=40)
    x = torch.randn(7, 5, dtype=dtype)
    with torch.no_grad():
        exact = exact_solution(cell.recurrent_weight(), cell.inject(x), activation)
        for tol in (1e-1, 1e-2, 1e-4, 1e-6):
            layer = DEQLayer(cell, solver=solver, tol=tol, max_iter=60, on_failure="ignore")
            layer(x)
            solution = layer.last_solution
            bound = solution.error_bound
            if dtype == torch.bfloat16 and scale * (1 + 8 * 2**-7) >= 1:
                assert bound is None
                continue
            error = (solution.value.double() - exact).norm(dim=1)
            assert (error <= bound).all(), (tol, (error / bound).max())


@scales
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_error_bound_is_reached_and_not_absurd(dtype, scale):
    """z = s z + c, the slowest direction: the residual is (1 - s) times the error, exactly."""
    for tol in (1e-1, 1e-2, 1e-3, 1e-4):
        case = Forward(
            scale * torch.eye(3, dtype=dtype), torch.randn(5, 3, dtype=dtype), "identity"
        )
        for implementation in IMPLEMENTATIONS:
            outputs = getattr(case, implementation)(Call(Picard(), tol, 5000))
            solution = Solution(*outputs[:4], contraction=scale)
            exact = exact_solution(case.weight, case.injection, "identity")
            error = (solution.value.double() - exact).norm(dim=1)
            assert (error <= solution.error_bound).all()
            # (|z| + eps) / (1 - residual) for |f(z)|, which |f| <= |z| + |r| gives
            eps = 8 * torch.finfo(dtype).eps * exact.norm(dim=1) / (1 - scale)
            assert (solution.error_bound <= error * (1 + 3 * tol) / (1 - tol) + 2 * eps).all()


@pytest.mark.parametrize("size", [512, 1024])
def test_the_error_bound_holds_at_the_rounding_floor(size):
    """The smallest residuals that there are, sums of many terms, and errors that pile up."""
    scale = 0.95
    for activation in ("identity", "tanh"):
        cell = orthogonal_cell(scale, activation, d=size, dtype=torch.float32)
        layer = DEQLayer(cell, solver="picard", tol=1e-7, max_iter=600, on_failure="ignore")
        x = torch.randn(4, 5)
        with torch.no_grad():
            layer(x)
            w, c = cell.recurrent_weight().double(), cell.inject(x).double()
            z, phi = layer.last_solution.value.double(), ACTIVATIONS[activation].function
            for _ in range(700):
                z = phi(torch.addmm(c, z, w.t()))
        error = (layer.last_solution.value.double() - z).norm(dim=1)
        assert (error <= layer.last_solution.error_bound).all()


def test_where_no_bound_is_known():
    x = torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        for weight, scale, activation in (
            ("dense", 0.3, "tanh"),
            ("symmetric", 0.3, "tanh"),
            ("orthogonal", 1.0, "tanh"),
            ("orthogonal", 1.2, "tanh"),
            ("orthogonal", 0.9, "gelu"),  # 0.9 * 1.129 > 1
        ):
            cell = AffineCell(
                5, 6, activation=activation, weight=weight, scale=scale, dtype=torch.float64
            )
            layer = DEQLayer(cell, on_failure="ignore")
            layer(x)
            assert layer.last_solution.error_bound is None
        layer = DEQLayer(orthogonal_cell(0.8, "gelu"), on_failure="raise")
        layer(x)
        assert layer.last_solution.error_bound is not None
        _, solution = fixed_point(lambda z: z / 2, torch.ones(2, 3))
        assert solution.error_bound is None
        # The same cell through the general path keeps what is known of it.
        hidden = DEQLayer(orthogonal_cell(0.8), solver=type("Mine", (Anderson,), {})())
        hidden(x)
        assert hidden.last_solution.error_bound is not None


def test_bad_samples_have_an_infinite_bound():
    layer = DEQLayer(orthogonal_cell(0.8), on_failure="ignore")
    x = torch.randn(3, 5, dtype=torch.float64)
    x[1, 2] = torch.nan
    layer(x)
    bound = layer.last_solution.error_bound
    assert bound.isfinite().tolist() == [True, False, True]
    assert math.isinf(bound[1])


CERTIFIED = Picard(fixed_iterations="certified")


@pytest.mark.parametrize(
    "cell",
    [
        orthogonal_cell(1.0),
        orthogonal_cell(1.3),
        orthogonal_cell(0.9, "gelu"),
        AffineCell(5, 6, weight="dense", scale=0.3, dtype=torch.float64),
        AffineCell(5, 6, weight="symmetric", scale=0.3, dtype=torch.float64),
    ],
    ids=repr,
)
@pytest.mark.parametrize("direction", ["solver", "adjoint"])
def test_certified_needs_a_contraction(direction, cell):
    solver = CERTIFIED if direction == "solver" else Neumann(fixed_iterations="certified")
    layer = DEQLayer(cell, **{direction: solver}, on_failure="ignore")
    with pytest.raises(ValueError, match="needs a map known to contract"):
        layer(torch.randn(2, 5, dtype=torch.float64, requires_grad=True))


def test_certified_counts_from_zero():
    layer = DEQLayer(orthogonal_cell(0.5), solver=CERTIFIED)
    x, z0 = torch.randn(2, 5, dtype=torch.float64), torch.zeros(2, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="counts from a start at zero"):
        layer(x, z0=z0)
    with pytest.raises(ValueError, match="needs a map known to contract"):
        fixed_point(torch.cos, torch.zeros(2, 2), solver=CERTIFIED)


@pytest.mark.parametrize("count", [-1, 2.5, "x", "Certified", float("nan"), float("inf"), None])
@pytest.mark.parametrize("kind", [Picard, Neumann])
def test_a_number_of_iterations_that_is_none(kind, count):
    with pytest.raises(ValueError, match=f"{kind.__name__}.*fixed_iterations"):
        kind(fixed_iterations=count)


def test_certified_takes_no_damping():
    with pytest.raises(ValueError, match="takes no damping"):
        Picard(damping=0.5, fixed_iterations="certified")
