"""The persistent CUDA solver on an emulated GPU against the reference: whole solves, with W spread
over the blocks of a group."""

import dataclasses
import random
import shutil

import pytest
import torch
from cuda_persistent_emulation import COMPILER, ROOMY, Device, Emulation, call_for, same, suited
from engine_cases import Call, Forward, make_adjoint, make_forward, make_weight, perturbed
from engine_checks import check_agreement, check_distance, true_residual, unit_of

from fastdeq.activations import ACTIVATIONS
from fastdeq.solution import Status
from fastdeq.solvers import Anderson, HeavyBall, Neumann, Picard

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})"
)
SIZES = (1, 7, 32, 33, 70)
BATCHES = (1, 3, 17)
DTYPES = (torch.float32, torch.float64)
SOLVERS = (
    Picard(),
    Picard(damping=0.7),
    HeavyBall(),
    Anderson(),
    Anderson(damping=0.7),
    Anderson(window=1),
    Anderson(window=8),
    Anderson(window=40),  # above every number of iterations
    Anderson(accelerate_above=0.5),
    Anderson(window=6, first_window=1),
    Anderson(accelerate_above=0.5, damping=0.7, window=3),
    Anderson(regularization=1e-6, rank_tolerance=1e-4, max_weight=2.0, safeguard=1.0),
)


@pytest.fixture(scope="module")
def emulation():
    return Emulation()


def check_slope(case, actual):
    """phi' of the pre-activation at the value, within what the sum's rounding moves it by."""
    unit, slope = unit_of(case), ACTIVATIONS[case.activation].slope
    pre, error = case.pre(actual.value), case.sum_error(actual.value, unit_of(case))
    ends = torch.stack([slope(pre + s * error) for s in (-1, 0, 1)])
    error = ends.amax(0) - ends.amin(0) + 16 * unit
    assert ((actual.value_slope - slope(pre)).abs() <= error).all()


def check(emulation, case, call, device=ROOMY):
    actual = emulation.solve(case, call, device)
    check_agreement(case, call, actual, case.reference(call))
    if actual.value_slope is not None:
        check_slope(case, actual)
    return actual


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_batches_on_devices_with_more_and_less_memory(emulation, size, batch):
    choose = random.Random(1000 * size + batch)
    for make in (make_forward, make_adjoint):
        for tight in (False, True):
            dtype, solver, options = choose.choice(DTYPES), choose.choice(SOLVERS), {}
            options["layout"] = choose.choice(("contiguous", "transposed", "strided"))
            if make is make_forward:
                options["activation"] = choose.choice(list(ACTIVATIONS))
                options["start"] = choose.choice(("none", "zeros", "random", "nan"))
            case = suited(make(batch, size, dtype, **options), solver)
            call = call_for(dtype, solver)
            device = emulation.tightest(case, call, ROOMY) if tight else ROOMY
            check(emulation, case, call, device)
            assert emulation.plan.members > 1 or not tight or size < 70
            assert emulation.plan.groups > 1 or tight or batch < 17


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_solvers_and_their_options(emulation, solver, dtype):
    for make in (make_forward, make_adjoint):
        case, call = suited(make(9, 45, dtype, rate=0.7), solver), call_for(dtype, solver)
        check(emulation, case, call)
        check(emulation, case, call, emulation.tightest(case, call, ROOMY))
        assert emulation.plan.members > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", range(4))
def test_every_register_tile_and_arrangement_of_warps(emulation, tile, dtype):
    for warps, size, batch in ((1, 41, 5), (4, 130, 35), (8, 70, 40)):
        case, call = make_forward(batch, size, dtype), call_for(dtype, Anderson())
        device = Device(6, 200_000, warps, tile)
        check(emulation, case, call, device)
        assert emulation.plan.tile == tile
        check(emulation, case, call, emulation.tightest(case, call, device))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(emulation, activation):
    for dtype in DTYPES:
        case = make_forward(5, 37, dtype, activation=activation, rate=0.8, start="random")
        check(emulation, case, call_for(dtype, Anderson()))


def test_groups_take_one_tile_after_another(emulation):
    """Twelve blocks in two groups or more, with five tiles; samples stop at different times."""
    for start in ("none", "random"):
        case = make_forward(70, 70, torch.float32, start=start)
        case.injection.mul_(torch.logspace(-2, 1, 70).unsqueeze(1))
        call = call_for(torch.float32, Anderson())
        device = emulation.tightest(case, call, Device(12))
        for slope in (False, True):
            actual = emulation.solve(case, call, device, slope=slope)
            check_agreement(case, call, actual, case.reference(call))
            assert emulation.plan.tiles > 2 * emulation.plan.groups >= 4
            assert emulation.plan.members > 1
        assert len(actual.iterations.unique()) > 2


def runaway(batch, dtype):
    """Samples whose accelerated steps are taken back: a kink in every unit, a steep weight."""
    weight = make_weight(24, 2.5).to(dtype)
    return Forward(weight, torch.randn(batch, 24, dtype=dtype), "hardtanh")


def test_steps_are_taken_back_as_in_the_reference(emulation):
    """To the step, in float64: for so few of them rounding does not decide."""
    counts = torch.zeros(3, dtype=torch.int64)
    solvers = (
        Anderson(safeguard=1.0),
        Anderson(window=9, safeguard=1.0),
        Anderson(accelerate_above=0.5, max_weight=1.5, rank_tolerance=0.2),
    )
    for solver in solvers:
        for max_iter in (6, 9):
            case, call = runaway(12, torch.float64), Call(solver, 1e-9, max_iter)
            actual = emulation.solve(case, call, emulation.tightest(case, call, ROOMY))
            expected = case.reference(call)
            for name in ("status", "iterations", "rejects"):
                assert torch.equal(getattr(actual, name), getattr(expected, name)), name
            torch.testing.assert_close(actual.value, expected.value, rtol=1e-6, atol=1e-6)
            counts += actual.rejects.sum(0)
    assert (counts > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", [*SOLVERS[:4], *SOLVERS[8:10]], ids=str)
def test_bad_samples_leave_the_others_bit_for_bit(emulation, solver, dtype):
    others = [0, 2, 3, 5]
    forward = make_forward(6, 70, dtype, activation="softplus")
    for case, name in ((forward, "injection"), (make_adjoint(6, 70, dtype), "grad")):
        call = call_for(dtype, solver)
        sick = dataclasses.replace(case, **{name: getattr(case, name).clone()})
        rows = getattr(sick, name)
        rows[1, 5], rows[4] = torch.nan, torch.inf
        for device in (ROOMY, emulation.tightest(case, call, ROOMY)):
            outputs = emulation.solve(sick, call, device)
            assert same(emulation.solve(case, call, device), outputs, others)
            assert (outputs.status[[1, 4]] == Status.NONFINITE).all()
            if outputs.value_slope is not None:
                assert (outputs.value_slope[[1, 4]] == 0).all()
                assert (outputs.value[[1, 4]] == 0).all()


@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_fixed_number_of_iterations(emulation, count):
    for damping in (1.0, 0.8):
        case = make_forward(4, 45, torch.float32, rate=0.5, start="random")
        call = Call(Picard(damping, fixed_iterations=count), 1e-3, 1000)
        actual = emulation.solve(case, call, emulation.tightest(case, call, ROOMY))
        expected = case.reference(call)
        assert torch.equal(actual.iterations, expected.iterations)
        assert torch.equal(actual.status, expected.status)
        check_distance(case, actual, expected)
    case = Forward(torch.full((1, 1), 1e30), torch.ones(2, 1), "identity")
    actual = emulation.solve(case, Call(Neumann(fixed_iterations=9), 1e-3))
    assert (actual.status == Status.NONFINITE).all()
    assert (actual.iterations < 3).all()


def test_one_iteration_and_an_unreachable_tolerance(emulation):
    for solver in (Picard(), Anderson(), HeavyBall()):
        case = make_forward(3, 33, torch.float64, rate=0.5)
        one = Call(solver, 1e-9, 1)
        actual, expected = emulation.solve(case, one), case.reference(one)
        assert torch.equal(actual.iterations, expected.iterations)
        assert (actual.status == Status.MAX_ITER).all()
        torch.testing.assert_close(actual.value, expected.value)
        hopeless = Call(solver, 0.0, 400)
        if isinstance(solver, HeavyBall):
            continue
        stagnated = emulation.solve(case, hopeless)
        # Or a residual of zero, where rounding has found a fixed point.
        assert (stagnated.iterations < 250).all()
        assert ((stagnated.status == Status.STAGNATED) | (stagnated.residual == 0)).all()
        check_distance(case, stagnated, case.reference(hopeless))


def test_statuses_of_solves_that_do_not_converge(emulation):
    eye, c = torch.eye(5), torch.rand(3, 5) + 0.5
    for case in (Forward(-1.5 * eye, c, "identity"), Forward(1e4 * eye, c, "relu")):
        call = Call(Picard(), 1e-3, 90)
        actual, expected = emulation.solve(case, call), case.reference(call)
        assert torch.equal(actual.status, expected.status)
        assert torch.equal(actual.iterations, expected.iterations)
        torch.testing.assert_close(actual.residual, expected.residual)
        # Iterates of the second one are about equally bad.
        difference, norm, _ = true_residual(case, actual.value)
        torch.testing.assert_close(actual.residual.double(), difference / norm, rtol=1e-5, atol=0)


def test_the_best_iterate_is_returned_where_the_residual_rises_again(emulation):
    """Of a heavy ball on a rotation, whose residual rises and falls."""
    angle = torch.tensor(1.2)
    w = 0.99 * torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos())).view(2, 2)
    case = Forward(w.double(), torch.randn(5, 2).double(), "identity")
    for max_iter in range(1, 9):
        call = Call(HeavyBall(), 1e-12, max_iter)
        actual, expected = emulation.solve(case, call), case.reference(call)
        torch.testing.assert_close(actual.value, expected.value)
        torch.testing.assert_close(actual.residual, expected.residual)
        difference, size, _ = true_residual(case, actual.value)
        torch.testing.assert_close(actual.residual, difference / size)
    assert (actual.iterations == 8).all()


@pytest.mark.parametrize("error", ["row", "transposed", "activation", "slope"])
def test_the_comparison_sees_a_planted_error(emulation, error):
    case = (make_adjoint if error == "slope" else make_forward)(6, 33, torch.float32)
    call = call_for(torch.float32, Anderson())
    actual = emulation.solve(perturbed(case, error), call)
    with pytest.raises(AssertionError):
        check_agreement(case, call, actual, case.reference(call))
