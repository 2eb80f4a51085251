"""Rows of the CPU engine's results: no sample knows of another, and what each is told is true."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_cases import Adjoint, Call, Forward, make_adjoint, make_forward
from engine_checks import unit_of

from fastdeq.activations import ACTIVATIONS
from fastdeq.backends import extension
from fastdeq.solution import Status
from fastdeq.solvers import Anderson, Neumann, Picard

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)
SOLVERS = (Picard(), Picard(damping=0.8), Anderson(), Anderson(accelerate_above=0.7))
KINDS = ((torch.float32, "float32"), (torch.float32, "mixed"), (torch.float64, "float32"))
# Rows of a product go through tiles of six, outputs through panels of 64; workers take 96 samples.
SIZES = (5, 70)
BATCH = 109


@pytest.fixture
def threads():
    """Sets the number of threads; one again afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def call_for(solver, kind, **changes):
    dtype, precision = kind
    tol = 1e-9 if dtype == torch.float64 else 1e-5
    return dataclasses.replace(Call(solver, tol, 60, precision), **changes)


def rows_of(case, chosen):
    """The problem of the chosen samples alone, in that order."""
    pick = {
        field.name: getattr(case, field.name)[chosen]
        for field in dataclasses.fields(case)
        if field.name not in ("weight", "activation") and getattr(case, field.name) is not None
    }
    return dataclasses.replace(case, **pick)


def assert_same(actual, expected, chosen=slice(None)):
    for a, e in zip(actual, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(a, e[chosen], rtol=0, atol=0, equal_nan=True)


def problems(kind, size, batch=BATCH, rate=0.8):
    start = make_forward(batch, size, kind[0], rate=rate, start="random")
    return start, make_forward(batch, size, kind[0], rate=rate), make_adjoint(batch, size, kind[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_batch_size_and_position_do_not_matter(solver, kind, size):
    call = call_for(solver, kind)
    for case in problems(kind, size):
        whole = case.engine(call)
        order = torch.randperm(BATCH)
        assert_same(rows_of(case, order).engine(call), whole, order)
        for chosen in (order[:1], order[:7], order[3:50]):
            assert_same(rows_of(case, chosen).engine(call), whole, chosen)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_number_of_threads_does_not_matter(solver, kind, threads):
    call = call_for(solver, kind)
    for case in problems(kind, 70):
        threads(1)
        alone = case.engine(call)
        threads(2)
        for _ in range(3):
            assert_same(case.engine(call), alone)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("batch", "size"),
    [(20, 330), (1, 769)],  # the panels of the weight are packed, and multiplied, by two
    ids=str,
)
def test_the_number_of_threads_does_not_matter_where_they_share_panels(batch, size, kind, threads):
    # Few updates: where the processors are busy, every meeting of the threads may take long.
    call = call_for(SOLVERS[3], kind, max_iter=8)
    for case in problems(kind, size, batch):
        threads(1)
        alone = case.engine(call)
        threads(2)
        assert_same(case.engine(call), alone)


def test_solves_at_the_same_time_do_not_meet():
    call = call_for(Anderson(), KINDS[1])
    cases = [case for _ in range(4) for case in problems(KINDS[1], 60)]
    alone = [case.engine(call) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: case.engine(call), cases))
    for a, e in zip(together, alone, strict=True):
        assert_same(a, e)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_bad_and_slow_samples_leave_the_others_alone(solver, kind, count, threads):
    """Among them samples that end at once, so that others get their slots."""
    threads(count)
    size, batch = 40, 2 * BATCH
    call = call_for(solver, kind)
    for case in problems(kind, size, batch):
        clean = case.engine(call)
        bad = torch.zeros(batch, dtype=torch.bool)
        bad[::5] = True
        name = "grad" if isinstance(case, Adjoint) else "injection"
        spoilt = getattr(case, name).clone()
        entries = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38])
        for sample in range(0, batch, 5):
            spoilt[sample, sample % size] = entries[sample % 4]
        bad_case = dataclasses.replace(case, **{name: spoilt})
        if isinstance(case, Forward):  # relu and a weight that contracts: 1e38 stays finite
            bad_case = dataclasses.replace(bad_case, activation="relu")
            clean = dataclasses.replace(case, activation="relu").engine(call)
        outputs = bad_case.engine(call)
        for field in outputs._fields:
            if getattr(clean, field) is not None:
                assert torch.equal(getattr(outputs, field)[~bad], getattr(clean, field)[~bad])
        assert (outputs.status[bad] != Status.CONVERGED).any()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_one_slow_sample_does_not_hold_or_change_the_others(solver, kind):
    """Sample 3 has its own block of the weight, in which it turns nearly without contracting."""
    size, turn = 48, torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=kind[0])
    weight = torch.zeros(size, size, dtype=kind[0])
    weight[2:, 2:] = make_forward(1, size - 2, kind[0], rate=0.5).weight
    weight[:2, :2] = 0.999 * turn
    c = torch.randn(12, size, dtype=kind[0])
    c[:, :2] = 0
    call = call_for(solver, kind)
    fast = Forward(weight, c, "identity").engine(call)
    slow = c.clone()
    slow[3, :2] = 1.0
    outputs = Forward(weight, slow, "identity").engine(call)
    others = torch.arange(12) != 3
    for a, e in zip(outputs, fast, strict=True):
        assert torch.equal(a[others], e[others])
    if solver == Picard():  # damping turns the eigenvalues i and -i into the disc
        assert outputs.status[3] == Status.MAX_ITER
        assert outputs.iterations[3] == call.max_iter
    assert (outputs.iterations[others] < 40).all()


def slope_bound(case, z, unit):
    """(B, d): how far phi' may be off, from the rounding of its argument and of itself."""
    slope, pre, error = ACTIVATIONS[case.activation].slope, case.pre(z), case.sum_error(z, unit)
    at = slope(pre)
    moved = torch.maximum((slope(pre + error) - at).abs(), (slope(pre - error) - at).abs())
    # 1 - t^2 and its kin: errors of a few units of numbers around one, or of p phi'(p) for gelu.
    return 2 * moved + 8 * unit * (1 + pre.abs()), at


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_slope_is_that_at_the_returned_value(activation, kind):
    for start in ("none", "random"):
        case = make_forward(11, 37, kind[0], activation=activation, start=start)
        for solver in (Picard(), Anderson()):
            for max_iter in (1, 60):  # also where it has not converged
                outputs = case.engine(call_for(solver, kind, max_iter=max_iter))
                bound, expected = slope_bound(case, outputs.value, unit_of(case))
                assert outputs.value_slope.dtype == kind[0]
                assert ((outputs.value_slope - expected).abs() <= bound).all()


def test_the_slope_check_sees_the_slope_of_another_iterate():
    case = make_forward(11, 37, torch.float32)
    early = case.engine(call_for(Picard(), KINDS[0], tol=3e-3))
    late = case.engine(call_for(Picard(), KINDS[0]))
    bound, expected = slope_bound(case, late.value, unit_of(case))
    assert not ((early.value_slope - expected).abs() <= bound).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_no_slope_where_none_is_requested_or_the_sample_failed(solver, kind):
    case = make_forward(7, 20, kind[0])
    assert case.engine(call_for(solver, kind), slope=False).value_slope.shape == (0,)
    case.injection[2, 3] = torch.nan
    outputs = case.engine(call_for(solver, kind))
    assert outputs.status[2] == Status.NONFINITE
    assert (outputs.value_slope[2] == 0).all()
    assert (outputs.value_slope[torch.arange(7) != 2] != 0).any(1).all()
    assert (outputs.value[2] == 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("solver", [Neumann(), *SOLVERS[2:]], ids=str)
def test_gradients_that_are_not_finite_or_do_not_count(solver, kind):
    case = make_adjoint(8, 20, kind[0])
    grad, slope = case.grad.clone(), case.slope.clone()
    grad[0, 3], grad[1, 0], grad[2, -1] = torch.nan, torch.inf, -torch.inf
    grad[3] = 0
    slope[4] = 0
    grad[5, 2], slope[5] = torch.nan, 0
    outputs = Adjoint(case.weight, slope, grad).engine(call_for(solver, kind))
    assert outputs.value[:3].isnan().all()
    assert (outputs.status[:3] == Status.NONFINITE).all()
    assert (outputs.iterations[:3] == 0).all()
    assert (outputs.value[3:6] == 0).all()
    assert (outputs.status[3:6] == Status.CONVERGED).all()
    assert (outputs.iterations[3:6] == 0).all()
    assert (outputs.value[6:] != 0).any(1).all()
    clean = case.engine(call_for(solver, kind))
    assert_same([o[6:] for o in outputs[:5]], [o[6:] for o in clean[:5]])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("solver", [Neumann(), *SOLVERS[2:]], ids=str)
def test_the_length_of_a_gradient_does_not_matter(solver, kind):
    """Powers of two change nothing but the exponent, down to where results become denormal."""
    case = make_adjoint(8, 20, kind[0])
    call = call_for(solver, kind)
    expected = case.engine(call)
    for exponent in (-100, -40, 40, 100):  # 1e-30 to 1e30
        scaled = Adjoint(case.weight, case.slope, case.grad * 2.0**exponent)
        outputs = scaled.engine(call)
        assert torch.equal(outputs.value, expected.value * 2.0**exponent)
        assert torch.equal(outputs.residual, expected.residual)
        assert torch.equal(outputs.iterations, expected.iterations)
