"""Solves by the steps engine: against the plain PyTorch one, and the truth in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from engine_cases import (
    Forward,
    make_adjoint,
    make_forward,
    make_weight,
    perturbed,
)
from engine_checks import check_agreement, check_distance
from fastdeq.kernels.steps import engine
from triton_solves import (
    CALL,
    MAKERS,
    SOLVERS,
    Engine,
    call_for,
    check_slope,
    check_truth,
    plain,
)

from fastdeq.activations import ACTIVATIONS
from fastdeq.solution import Status
from fastdeq.solvers import GMRES, MINRES, Anderson, Energy, HeavyBall, Picard


@pytest.fixture
def solve(device):
    return Engine(device)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("solver", "size"),
    [(s, 33) for s in SOLVERS] + [(s, size) for s in SOLVERS[1:3] for size in (1, 70)],
    ids=str,
)
def test_agrees_with_the_reference(solver, size, make, solve):
    case, call = make(2, size, torch.float32, rate=0.4), call_for(solver)
    outputs = solve(case, call)
    check_agreement(case, call, outputs, plain(case, call))
    check_truth(case, call, outputs)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("size", [1, 33])
def test_heavy_ball_agrees_with_the_reference(size, make, solve):
    """On symmetric weights, for which it is made; the counts may differ by what a rounded estimate
    of the radius makes of them."""
    case = make(2, size, torch.float32, rate=0.6)
    half = case.weight.double() / 2
    case, call = dataclasses.replace(case, weight=(half + half.t()).float()), call_for(HeavyBall())
    outputs, expected = solve(case, call), plain(case, call)
    check_distance(case, outputs, expected)
    check_truth(case, call, outputs)
    assert (outputs.status == Status.CONVERGED).all()
    assert (outputs.iterations - expected.iterations).abs().max() <= 2


def test_more_samples_than_a_tile_has_rows(solve):
    case = make_forward(67, 6, torch.float32, rate=0.3)
    check_agreement(case, CALL, solve(case, CALL), plain(case, CALL))


@pytest.mark.parametrize("momentum", [False, True])
def test_the_solvers_of_symmetric_cells_are_supported(momentum, solve):
    for make, solver in ((make_forward, Energy(momentum)), (make_adjoint, MINRES(momentum))):
        case, call = make(2, 20, torch.float32, rate=0.6), call_for(solver)
        half = case.weight.double() / 2
        case = dataclasses.replace(case, weight=(half + half.t()).float())
        outputs = solve(case, call)
        assert (outputs.status == Status.CONVERGED).all()
        check_truth(case, call, outputs)


@pytest.mark.parametrize("planted", ["row", "transposed", "other"])
@pytest.mark.parametrize("make", MAKERS)
def test_the_comparison_notices_a_planted_error(make, planted, solve):
    case = make(2, 33, torch.float32, rate=0.4)
    other = "activation" if isinstance(case, Forward) else "slope"
    wrong = perturbed(case, other if planted == "other" else planted)
    with pytest.raises(AssertionError):
        check_agreement(case, CALL, solve(wrong, CALL), plain(case, CALL))
    with pytest.raises(AssertionError):
        check_truth(case, CALL, solve(wrong, CALL))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_its_slope(activation, solve):
    case = make_forward(2, 17, torch.float32, activation=activation, rate=0.4)
    outputs = solve(case, CALL, slope=True)
    check_agreement(case, CALL, outputs, plain(case, CALL))
    check_slope(case, outputs)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), HeavyBall()], ids=str)
def test_the_slope_belongs_to_the_best_iterate_and_not_to_the_last(solver, solve):
    """No contraction: the last iterate is as a rule not the best one."""
    case = Forward(make_weight(20, 3.0).float(), torch.randn(4, 20))
    call = call_for(solver, max_iter=7)
    outputs = solve(case, call, slope=True)
    assert (outputs.status == Status.MAX_ITER).all()
    check_slope(case, outputs)
    check_truth(case, call, outputs)
    with pytest.raises(AssertionError):
        check_slope(case, outputs._replace(value=outputs.value + 1e-4))


@pytest.mark.parametrize("start", ["zeros", "random", "nan"])
@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
def test_starts(solver, start, solve):
    case, call = make_forward(3, 21, torch.float32, rate=0.4, start=start), call_for(solver)
    check_agreement(case, call, solve(case, call), plain(case, call))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", MAKERS)
def test_half_precision_inputs_are_solved_in_float32(make, dtype, solve):
    case = make(3, 21, dtype, rate=0.4)
    outputs, expected = solve(case, CALL), plain(case, CALL)
    assert outputs.value.dtype == dtype
    assert outputs.residual.dtype == torch.float32
    check_agreement(case, CALL, outputs, expected)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
@pytest.mark.parametrize("make", MAKERS)
def test_layouts(make, layout, solve):
    case = make(3, 21, torch.float32, rate=0.4, layout=layout, rows=layout)
    check_agreement(case, CALL, solve(case, CALL), plain(case, CALL))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("solver", "size"), [(Anderson(window=1), 9), (Anderson(window=12), 3)], ids=str
)
def test_windows_of_one_and_beyond_the_size(solver, size, make, solve):
    case, call = make(2, size, torch.float32, rate=0.4), call_for(solver)
    outputs = solve(case, call)
    check_distance(case, outputs, plain(case, call))
    check_truth(case, call, outputs)
    assert (outputs.status == Status.CONVERGED).all()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("solver", [*SOLVERS, HeavyBall()], ids=str)
def test_one_update_of_one_sample(solver, make, solve):
    case, call = make(1, 9, torch.float32), call_for(solver, max_iter=1)
    outputs, expected = solve(case, call), plain(case, call)
    assert outputs.status.tolist() == [Status.MAX_ITER]
    assert outputs.iterations.tolist() == [1]
    torch.testing.assert_close(outputs.residual, expected.residual, rtol=1e-5, atol=0)
    torch.testing.assert_close(outputs.value, expected.value, rtol=1e-5, atol=1e-6)
    check_truth(case, call, outputs)


@pytest.mark.parametrize("make", MAKERS)
def test_a_fixed_number_of_updates(make, solve):
    case = make(3, 15, torch.float32, rate=0.5)
    for count, status in ((2, Status.MAX_ITER), (20, Status.CONVERGED)):
        call = call_for(Picard(fixed_iterations=count), max_iter=3)
        outputs, expected = solve(case, call), plain(case, call)
        assert (outputs.iterations == count).all()
        assert (outputs.status == status).all()
        check_distance(case, outputs, expected)
        torch.testing.assert_close(outputs.residual, expected.residual, rtol=0.1, atol=3e-7)


def test_a_fixed_number_of_updates_reads_nothing(device):
    nobody = torch.zeros(1, dtype=torch.int32, device=device)
    fixed = call_for(Picard(fixed_iterations=9)).options()
    assert not engine.DelayedCount(nobody, fixed).all_stopped(3)
    count = engine.DelayedCount(nobody, CALL.options())
    looks = [count.all_stopped(k) for k in range(3)]
    if nobody.is_cuda:
        count.all_stopped(3)
        torch.cuda.synchronize()
        looks.append(count.all_stopped(4))
    assert looks[-1]


def test_below_the_rounding_floor_a_solve_stagnates(solve):
    case, call = make_forward(2, 9, torch.float32, rate=0.3), call_for(Picard(), tol=0, max_iter=99)
    outputs, expected = solve(case, call), plain(case, call)
    assert set(outputs.status.tolist()) <= {Status.STAGNATED, Status.CONVERGED}
    assert (outputs.residual < 1e-6).all()
    assert (outputs.iterations < 99).all()
    check_distance(case, outputs, expected)


def test_steps_are_taken_back_and_counted(solve):
    """Far from a contraction, with a short memory: the residual does not fall by itself."""
    case = Forward(3 * torch.randn(12, 12) / math.sqrt(12), torch.randn(3, 12))
    call = call_for(Anderson(window=2, safeguard=1.0), max_iter=15)
    outputs, expected = solve(case, call), plain(case, call)
    assert outputs.rejects[:, 0].sum() > 0
    assert expected.rejects[:, 0].sum() > 0
    check_truth(case, call, outputs)


def test_what_is_not_supported_is_said():
    long = call_for(Anderson(window=65), max_iter=100)
    for call in (CALL, call_for(Anderson()), dataclasses.replace(long, max_iter=64)):
        assert engine.why_not(call.options(), torch.bfloat16) == ""
    assert "float64" in engine.why_not(CALL.options(), torch.float64)
    assert "at most 64, not 65" in engine.why_not(long.options(), torch.float32)
    assert "no solver 'gmres'" in engine.why_not(call_for(GMRES()).options(), torch.float32)
