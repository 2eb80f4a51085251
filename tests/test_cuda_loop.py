"""The CUDA loop's kernels on an emulated GPU, with products by the CPU in between, against
fastdeq.affine: whole solves, as csrc/cuda/loop.cu runs them."""

import ctypes
import dataclasses
import random
import shutil

import pytest
import torch
from cuda_loop_emulation import (
    COMPILER,
    ROOT,
    SOLVERS,
    Emulation,
    assert_same,
    call_for,
    case_for,
    check_truth,
    compile_emulation,
    rows_of,
)
from engine_cases import (
    Call,
    Forward,
    Outputs,
    make_adjoint,
    make_forward,
    make_weight,
    perturbed,
)
from engine_checks import check_agreement, check_distance, unit_of

from fastdeq.activations import ACTIVATIONS
from fastdeq.solution import Status
from fastdeq.solvers import Anderson, HeavyBall, Picard

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})"
)
SIZES = (1, 31, 33, 70, 130)
BATCHES = (1, 3, 17)
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_emulation(tmp_path_factory.mktemp("loop"))


@pytest.fixture
def loop(library):
    return Emulation(library)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_batches(loop, size, batch):
    choose = random.Random(1000 * size + batch)
    for make in (make_forward, make_adjoint):
        for dtype in DTYPES:
            solver, options = choose.choice(SOLVERS), {}
            if make is make_forward:
                options["activation"] = choose.choice(list(ACTIVATIONS))
                options["start"] = choose.choice(("none", "zeros", "random", "nan"))
            call = call_for(dtype, solver)
            case = case_for(solver, make, batch, size, dtype, **options)
            check_agreement(case, call, loop.solve(case, call), case.reference(call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_solvers_and_their_options(loop, solver, dtype):
    for make, size, pack in ((make_forward, 21, 1), (make_adjoint, 21, 1), (make_forward, 132, 4)):
        call = call_for(dtype, solver)
        case = case_for(solver, make, 9, size, dtype, rate=0.7)
        actual, expected = loop.solve(case, call, pack=pack), case.reference(call)
        check_agreement(case, call, actual, expected)
        if actual.value_slope is not None:
            # phi' of tanh moves by at most 0.77 per unit of its argument.
            moved = (case.pre(actual.value) - case.pre(expected.value)).abs()
            bound = moved + 2 * case.sum_error(expected.value, unit_of(case)) + 1e-6
            assert ((actual.value_slope - expected.value_slope).abs() <= bound).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(loop, activation):
    for dtype in DTYPES:
        case = make_forward(5, 37, dtype, activation=activation, rate=0.8, start="random")
        call = call_for(dtype, Anderson())
        check_agreement(case, call, loop.solve(case, call), case.reference(call))


def runaway(batch, dtype):
    """Samples whose accelerated steps are taken back: a kink in every unit, a steep weight."""
    weight = make_weight(24, 4.0).to(dtype)
    return Forward(weight, torch.randn(batch, 24, dtype=dtype), "hardtanh")


def test_steps_are_taken_back_as_in_the_reference(loop):
    """To the step, in float64: for so few of them rounding does not decide."""
    counts = torch.zeros(3, dtype=torch.int64)
    for solver in (Anderson(safeguard=1.0), Anderson(accelerate_above=0.5, max_weight=0.3)):
        for max_iter in (6, 9):
            case, call = runaway(20, torch.float64), Call(solver, 1e-9, max_iter)
            actual, expected = loop.solve(case, call), case.reference(call)
            for name in ("status", "iterations", "rejects"):
                assert torch.equal(getattr(actual, name), getattr(expected, name)), name
            torch.testing.assert_close(actual.value, expected.value, rtol=1e-6, atol=1e-6)
            counts += actual.rejects.sum(0)
    assert counts[0] > 0
    assert counts[1] > 0


LONGEST_WAIT = 4
RAMPED = (*SOLVERS[:4], Anderson(window=10, accelerate_above=0.7), Anderson(damping=0.8))


@pytest.mark.parametrize("solver", RAMPED, ids=str)
@pytest.mark.parametrize("size", [31, 128])
def test_narrow_products_do_most_of_the_work_and_report_the_truth(loop, size, solver):
    narrow = exact = 0
    for make, rate in ((make_forward, 0.9), (make_adjoint, 0.9)):
        for tol in (1e-3, 1e-5):
            case = case_for(solver, make, 8, size, torch.float32, rate=rate)
            call = Call(solver, tol, 200)
            full = loop.solve(case, call)
            mixed = loop.solve(case, call, ramp=True, pack=4 if size % 4 == 0 else 1)
            exact, narrow = exact + loop.products.exact, narrow + loop.products.narrow
            check_truth(case, call, mixed)
            check_distance(case, mixed, full)
            assert (full.status == Status.CONVERGED).all()
            assert (mixed.status == Status.CONVERGED).all()
            # A sample may wait for its mates; the batch does not take longer.
            assert (mixed.iterations - full.iterations).max() <= LONGEST_WAIT + 3
            assert mixed.iterations.max() <= full.iterations.max() + 3
    assert narrow > exact


@pytest.mark.parametrize("solver", [RAMPED[0], RAMPED[2], RAMPED[4]], ids=str)
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_ramped_solves_that_do_not_contract_are_reported_truly(loop, solver, activation):
    """Some overflow in a narrow evaluation, and go on from the best point in full precision."""
    for norm, max_iter in ((1.5, 40), (3.0, 2), (1e4, 40)):
        case = Forward(make_weight(32, norm).float(), torch.randn(6, 32), activation)
        call = Call(solver, 1e-4, max_iter)
        outputs = loop.solve(case, call, ramp=True)
        check_truth(case, call, outputs)
        assert outputs.value.isfinite().all()
        unfinished = outputs.status == Status.MAX_ITER
        assert (outputs.iterations[unfinished] == max_iter).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS[:4] + SOLVERS[7:9], ids=str)
def test_bad_samples_leave_their_mates_bit_for_bit(loop, solver, dtype):
    call = call_for(dtype, solver)
    for make, name in ((make_forward, "injection"), (make_adjoint, "grad")):
        case = make(6, 33, dtype)
        sick = dataclasses.replace(case, **{name: getattr(case, name).clone()})
        rows = getattr(sick, name)
        rows[1, 5], rows[4] = torch.nan, torch.inf
        mates = [0, 2, 3, 5]
        outputs = loop.solve(sick, call)
        assert_same(loop.solve(rows_of(case, mates), call), loop.solve(case, call), mates)
        assert_same(loop.solve(rows_of(case, mates), call), outputs, mates)
        assert outputs.status[1] == Status.NONFINITE
        assert torch.equal(outputs.status, sick.reference(call).status)
        if outputs.value_slope is not None:
            assert (outputs.value_slope[1] == 0).all()
        if dtype == torch.float32:  # with narrow products mates share the kinds of products alone
            ramped = loop.solve(sick, call, ramp=True)
            healthy = Outputs(*(None if t is None else t[mates] for t in ramped))
            check_truth(rows_of(case, mates), call, healthy)
            assert (healthy.status == Status.CONVERGED).all()


def test_enqueued_iterations_give_the_same_as_the_graph(loop):
    for solver in (SOLVERS[0], SOLVERS[2], SOLVERS[7]):
        case, call = make_forward(5, 33, torch.float32), call_for(torch.float32, solver)
        assert_same(loop.solve(case, call, graph=False), loop.solve(case, call))
        assert loop.products.exact <= 20 < call.max_iter


@pytest.mark.parametrize("ramp", [False, True])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_fixed_number_of_iterations(loop, count, ramp):
    for damping in (1.0, 0.8):
        case = make_forward(4, 33, torch.float32, rate=0.5, start="random")
        call = Call(Picard(damping, fixed_iterations=count), 1e-3, 1000)
        actual, expected = loop.solve(case, call, ramp=ramp), case.reference(call)
        assert torch.equal(actual.iterations, expected.iterations)
        assert torch.equal(actual.status, expected.status)
        check_distance(case, actual, expected)
        assert loop.products.exact + loop.products.narrow == count + 1


def test_one_iteration_and_an_unreachable_tolerance(loop):
    for solver in (Picard(), Anderson(), HeavyBall()):
        case = case_for(solver, make_forward, 3, 31, torch.float64, rate=0.5)
        one = Call(solver, 1e-9, 1)
        actual, expected = loop.solve(case, one), case.reference(one)
        assert torch.equal(actual.iterations, expected.iterations)
        assert (actual.status == Status.MAX_ITER).all()
        torch.testing.assert_close(actual.value, expected.value)
        hopeless = Call(solver, 0.0, 400)
        stagnated = loop.solve(case, hopeless)
        # Or a residual of zero, where rounding has found a fixed point.
        assert (stagnated.iterations < 250).all()
        assert ((stagnated.status == Status.STAGNATED) | (stagnated.residual == 0)).all()
        check_distance(case, stagnated, case.reference(hopeless))


def test_statuses_of_solves_that_do_not_converge(loop):
    eye, c = torch.eye(5), torch.rand(3, 5) + 0.5
    for case in (Forward(-1.5 * eye, c, "identity"), Forward(1e4 * eye, c, "relu")):
        call = Call(Picard(), 1e-3, 90)
        actual, expected = loop.solve(case, call), case.reference(call)
        assert torch.equal(actual.status, expected.status)
        assert torch.equal(actual.iterations, expected.iterations)
        torch.testing.assert_close(actual.residual, expected.residual)  # of more than one iterate


@pytest.mark.parametrize("error", ["row", "transposed", "activation", "slope"])
def test_the_comparison_sees_a_planted_error(loop, error):
    case = (make_adjoint if error == "slope" else make_forward)(6, 33, torch.float32)
    call = call_for(torch.float32, Anderson())
    with pytest.raises(AssertionError):
        check_agreement(case, call, loop.solve(perturbed(case, error), call), case.reference(call))


def places(name, what):
    """Where the kernels' threads wait for each other, or let others see what they wrote."""
    lines = (ROOT / "csrc/cuda" / name).read_text().splitlines()
    return [f"{name}:{number}" for number, line in enumerate(lines, 1) if what in line]


WAITS = [(place, False) for place in places("loop.cuh", "__syncthreads")]
# The first fence; the second one orders a thread's own accesses, which are in order here.
FENCES = [(place, True) for place in places("loop_task.cuh", "__threadfence")[:1]]


@pytest.mark.parametrize(("place", "ramp"), WAITS + FENCES)
def test_a_missing_synchronisation_is_seen(loop, place, ramp):
    case = make_forward(3, 130, torch.float32, rate=0.8)
    call = call_for(torch.float32, Anderson(accelerate_above=0.1))
    whole = loop.solve(case, call, ramp=ramp)
    differs = False
    for _ in range(20):
        try:
            assert_same(loop.solve(case, call, ramp=ramp, skip=place), whole)
        except AssertionError:  # another result, or an error of the machine
            differs = True
            break
        assert loop.skipped
    assert differs


def test_the_small_solve_of_a_warp_is_that_of_a_thread(library):
    doubles = ctypes.POINTER(ctypes.c_double)
    for slots, size, options in (
        (2, 1, (1.0, 1e-12, 1e-10, 1e8)),
        (6, 40, (1.0, 1e-12, 1e-10, 1e8)),
        (6, 3, (1.0, 1e-12, 1e-10, 1e8)),  # dependent columns
        (6, 40, (1.0, 1e-2, 1e-10, 0.1)),  # weights above the cap
        (40, 60, (1.0, 1e-12, 1e-10, 1e8)),  # more columns than lanes
    ):
        g = torch.randn(slots, size, dtype=torch.float64)
        gram = g @ g.t()
        for count in (slots - 1, slots // 2, 1, 0):
            unused = [j for j in range(slots) if (1 - j) % slots > count]
            gram[unused] = gram[:, unused] = torch.nan  # they may hold anything
            found = []
            for by_warp in (0, 1):
                gamma, outcome = torch.zeros(slots).double(), (ctypes.c_int * 2)()
                library.small_solve_call(
                    *(ctypes.cast(gram.data_ptr(), doubles), slots, 1, count),
                    *((ctypes.c_double * 4)(*options), by_warp),
                    *(ctypes.cast(gamma.data_ptr(), doubles), outcome),
                )
                found.append((gamma.tolist(), list(outcome)))
            assert found[0] == found[1]


def test_numbers_round_to_bfloat16_as_in_pytorch(library):
    library.round_to_bfloat16.argtypes = [ctypes.c_float]
    halves = torch.arange(1, 200) * 2.0**-8 + 1  # ties among them
    ends = torch.tensor([0.0, -0.0, 3.4e38, -3.4e38, torch.inf, -torch.inf, 1e-40, 1.2e-38])
    numbers = torch.cat((torch.randn(500), halves / 2, -halves, ends))
    rounded = [library.round_to_bfloat16(x) for x in numbers.tolist()]
    expected = numbers.bfloat16().view(torch.int16).int() & 0xFFFF
    assert rounded == expected.tolist()
    nan = torch.tensor([library.round_to_bfloat16(float("nan"))], dtype=torch.int16)
    assert nan.view(torch.bfloat16).isnan()
