"""The CPU engine against its specification, the reference, and what it refuses."""

import random

import pytest
import torch
from engine_cases import Adjoint, Call, Forward, make_adjoint, make_forward, perturbed
from engine_checks import check_agreement, unit_of

from fastdeq.activations import ACTIVATIONS
from fastdeq.backends import extension
from fastdeq.solution import Status
from fastdeq.solvers import Anderson, Neumann, Picard

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)
SIZES = (1, 2, 3, 15, 16, 17, 33, 63, 64, 65, 100, 130)
BATCHES = (1, 2, 5, 6, 7, 13, 100, 200)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SOLVERS = (
    Picard(),
    Picard(damping=0.7),
    Anderson(),
    Anderson(damping=0.7),
    Anderson(window=1),
    Anderson(window=140),  # above every size and every number of iterations
    Anderson(accelerate_above=0.5),
    Anderson(window=10, first_window=2),
    Anderson(window=4, first_window=1, accelerate_above=0.3),
    Anderson(accelerate_above=0.5, damping=0.7, window=3),
    Anderson(regularization=1e-6, rank_tolerance=1e-4, max_weight=2.0, safeguard=1.0),
)
TOL = {torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float64: 1e-9}


def call_for(dtype, solver, **changes):
    return Call(solver, **{"tol": TOL[dtype], "max_iter": 90, **changes})


def check(case, call):
    actual, expected = case.engine(call), case.reference(call)
    check_agreement(case, call, actual, expected)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_batches_and_layouts(size, batch):
    choose = random.Random(1000 * size + batch)
    rows = ("contiguous", "transposed", "strided")
    for make in (make_forward, make_adjoint):
        dtype, solver = choose.choice(DTYPES), choose.choice(SOLVERS)
        options = {"layout": choose.choice((*rows, "expanded")), "rows": choose.choice(rows)}
        if make is make_forward:
            options["activation"] = choose.choice(list(ACTIVATIONS))
            options["start"] = choose.choice(("none", "zeros", "random", "nan"))
        elif isinstance(solver, Picard):
            solver = Neumann(solver.damping)
        check(make(batch, size, dtype, **options), call_for(dtype, solver))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_more_terms_than_a_sum_takes_at_once(layout):
    for make in (make_forward, make_adjoint):
        check(make(7, 513, torch.float32, layout=layout), call_for(torch.float32, Picard()))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    for rate, start in ((0.6, "none"), (0.8, "random")):
        case = make_forward(9, 37, dtype, activation=activation, rate=rate, start=start)
        check(case, call_for(dtype, Anderson()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_solver_options(solver, dtype):
    check(make_forward(9, 21, dtype, rate=0.7), call_for(dtype, solver))
    check(make_adjoint(9, 21, dtype, rate=0.7), call_for(dtype, solver))


@pytest.mark.parametrize("mixed", [(1, 0), (0, 1)], ids=str)
def test_one_double_tensor_makes_the_solve_double(mixed):
    case = make_forward(4, 19, torch.float32, start="random")
    weight, injection = (
        t.double() if m else t for t, m in zip(case.tensors(), mixed, strict=False)
    )
    check(Forward(weight, injection, "tanh", case.start), call_for(torch.float64, Anderson()))
    adjoint = make_adjoint(4, 19, torch.float32)
    weight, slope = (t.double() if m else t for t, m in zip(adjoint.tensors(), mixed, strict=False))
    check(Adjoint(weight, slope, adjoint.grad), call_for(torch.float64, Neumann()))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("damping", [1.0, 0.7])
@pytest.mark.parametrize("updates", [1, 2, 7])
def test_after_so_many_updates_only_rounding_differs(updates, damping, dtype):
    for case in (make_forward(6, 50, dtype, rows="strided"), make_adjoint(6, 50, dtype)):
        call = call_for(dtype, Picard(damping), tol=0.0, max_iter=updates)
        actual, expected = case.engine(call), case.reference(call)
        for outputs in (actual, expected):
            assert (outputs.status == Status.MAX_ITER).all()
            assert (outputs.iterations == updates).all()
        z = expected.value.double() / case.scale()
        # Rounding of two solves; 2, for iterates longer than the last.
        bound = 2 * 2 * case.rounding(z, unit_of(case)) / (1 - case.lipschitz())
        distance = ((actual.value - expected.value).double() / case.scale()).norm(dim=1)
        assert (distance <= bound).all()
        residual_bound = 2 * bound / z.norm(dim=1)
        assert ((actual.residual - expected.residual).abs() <= residual_bound).all()


@pytest.mark.parametrize("error", ["row", "transposed", "activation", "slope"])
@pytest.mark.parametrize("size", [3, 64, 130])
def test_the_comparison_sees_a_planted_error(error, size):
    forward = error != "slope"
    case = (make_forward if forward else make_adjoint)(6, size, torch.float32)
    call = call_for(torch.float32, Anderson())
    with pytest.raises(AssertionError):
        check_agreement(case, call, perturbed(case, error).engine(call), case.reference(call))


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
def test_the_comparison_sees_twice_the_tolerance(solver):
    case, call = make_forward(13, 64, torch.float32), call_for(torch.float32, solver)
    looser = call_for(torch.float32, solver, tol=2 * call.tol)
    with pytest.raises(AssertionError):
        check_agreement(case, call, case.engine(looser), case.reference(call))


def check_identical(case, call):
    """For problems whose status and counts do not depend on rounding."""
    actual, expected = case.engine(call), case.reference(call)
    for name in ("status", "iterations", "rejects"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    torch.testing.assert_close(actual.value, expected.value)
    torch.testing.assert_close(actual.residual, expected.residual)
    return actual


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("solver", [Picard(), Picard(damping=0.9)], ids=str)
def test_statuses_of_solves_that_do_not_converge(dtype, solver):
    eye, c = torch.eye(5, dtype=dtype), torch.rand(3, 5, dtype=dtype) + 0.5
    # z -> c - 1.5 z runs away too slowly to overflow before patience ends.
    stagnated = check_identical(
        Forward(-1.5 * eye, c, "identity"), call_for(dtype, solver, tol=1e-3)
    )
    assert (stagnated.status == Status.STAGNATED).all()
    assert (stagnated.iterations == 50).all()
    bad = c.clone()
    bad[1, 2] = torch.nan
    partly = check_identical(Forward(0.5 * eye, bad), call_for(dtype, solver, tol=1e-3))
    assert partly.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert (partly.value[1] == 0).all()


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
def test_overflow_ends_nonfinite_with_the_best_finite_iterate(solver):
    case = Forward(1e4 * torch.eye(6), torch.rand(3, 6) + 0.5, "relu")
    call = call_for(torch.float32, solver, tol=1e-3)
    actual, expected = case.engine(call), case.reference(call)
    for outputs in (actual, expected):
        assert outputs.value.isfinite().all()
        assert outputs.residual.isfinite().all()
        assert (outputs.status != Status.CONVERGED).all()
    if isinstance(solver, Picard):  # rounding decides where a step is taken back from infinity to
        assert torch.equal(actual.status, expected.status)
        torch.testing.assert_close(actual.residual, expected.residual)


# |f|^2 overflows an iterate before |f - z|^2 does: "finite / inf = 0" would end such a solve.
@pytest.mark.parametrize("implementation", ["engine", "reference"])
@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("scale", [2.5, 3.0, 4.0])
def test_a_solve_that_diverges_is_never_taken_for_one_that_converged(
    scale, precision, implementation
):
    weight = scale * torch.randn(128, 128) / 128**0.5
    c = torch.randn(64, 128)
    forward = [Forward(weight, c, activation) for activation in ("relu", "elu", "identity")]
    for case in (*forward, Adjoint(weight, torch.ones_like(c), c)):
        outputs = getattr(case, implementation)(Call(Picard(), 1e-4, 100, precision))
        assert (outputs.status != Status.CONVERGED).all()
        assert (outputs.residual > 1e-4).all()
        assert outputs.value.isfinite().all()


def test_rejects_of_samples_that_end_nonfinite():
    """The step that fails is none that was taken: its dropped columns do not count."""
    case = Forward(1e100 * torch.eye(3).double(), torch.ones(2, 3).double(), "identity")
    call = call_for(torch.float64, Anderson(max_weight=0.0))
    actual, expected = case.engine(call), case.reference(call)
    assert (actual.status == Status.NONFINITE).all()
    assert torch.equal(actual.status, expected.status)
    assert torch.equal(actual.iterations, expected.iterations)
    assert torch.equal(actual.rejects, expected.rejects)


@pytest.mark.parametrize("implementation", ["engine", "reference"])
def test_a_gradient_whose_norm_overflows_stays_finite(implementation):
    grad = torch.full((1, 100), 1e38)
    case = Adjoint(torch.zeros(100, 100), torch.ones(1, 100), grad)
    torch.testing.assert_close(getattr(case, implementation)(Call(Neumann())).value, grad)


def test_a_weight_with_nan_ends_nonfinite():
    weight = torch.eye(20) / 2
    weight[3, 4] = torch.nan
    case = Forward(weight, torch.rand(5, 20))
    for solver in (Picard(), Anderson()):
        outputs = case.engine(call_for(torch.float32, solver))
        assert (outputs.status == Status.NONFINITE).all()
        assert outputs.value.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_tolerance_zero_converges_where_the_residual_is_zero(dtype):
    case = Forward(torch.zeros(4, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype))
    solved = check_identical(case, call_for(dtype, Picard(), tol=0.0))
    assert (solved.status == Status.CONVERGED).all()
    assert (solved.iterations == 1).all()
    started = Forward(case.weight, case.injection, "tanh", solved.value)
    assert (started.engine(call_for(dtype, Picard(), tol=0.0)).iterations == 0).all()


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
def test_tolerance_zero_ends_at_the_rounding_floor(solver):
    for case in (make_forward(7, 40, torch.float32), make_adjoint(7, 40, torch.float32)):
        solved = case.engine(call_for(torch.float32, solver, tol=0.0, max_iter=200))
        assert (solved.status != Status.NONFINITE).all()
        # The iterate is as far from the solution as rounding puts it, and is evaluated once more.
        z = solved.value.double() / case.scale()
        floor = 2 * case.rounding(z, unit_of(case)) / (1 - case.lipschitz())
        assert (solved.residual <= floor / case.step(z).norm(dim=1)).all()


@pytest.mark.parametrize("batch_and_size", [(0, 7), (0, 1), (3, 0)], ids=str)
@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
def test_nothing_to_solve(batch_and_size, solver):
    batch, size = batch_and_size
    call = call_for(torch.float32, solver)
    weight, rows = torch.randn(size, size), torch.randn(batch, size)
    for case in (Forward(weight, rows), Adjoint(weight, rows, rows)):
        for actual, expected in zip(case.engine(call), case.reference(call), strict=True):
            if expected is not None:
                assert actual.shape == expected.shape
                assert actual.dtype == expected.dtype
