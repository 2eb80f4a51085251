"""Solves by the steps engine: bad samples, and the precision schedule."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from engine_cases import (
    Adjoint,
    Forward,
    Outputs,
    make_adjoint,
    make_forward,
)
from engine_checks import check_distance
from triton_solves import CALL, MAKERS, SOLVERS, Engine, call_for, check_truth, name_of

from fastdeq.solution import Status
from fastdeq.solvers import Anderson, HeavyBall, Neumann, Picard


@pytest.fixture
def solve(device):
    return Engine(device)


@pytest.mark.parametrize("solver", SOLVERS[1:4], ids=str)
def test_bad_samples_leave_the_others_bitwise_alone(solver, solve):
    case, call = make_forward(4, 17, torch.float32, activation="relu", rate=0.3), call_for(solver)
    clean = solve(case, call, slope=True)
    injection = case.injection.clone()
    injection[1, 3], injection[2, 0] = torch.nan, -torch.inf
    injection[2, 1] = torch.inf
    outputs = solve(dataclasses.replace(case, injection=injection), call, slope=True)
    for name in Outputs._fields:
        assert torch.equal(getattr(outputs, name)[[0, 3]], getattr(clean, name)[[0, 3]]), name
    assert outputs.status.tolist() == [0, Status.NONFINITE, Status.NONFINITE, 0]
    assert (outputs.value[1:3] == 0).all()
    assert (outputs.value_slope[1:3] == 0).all()


@pytest.mark.parametrize("solver", [Neumann(), Anderson()], ids=str)
def test_gradients_that_are_not_finite_or_do_not_count(solver, solve):
    case, call = make_adjoint(6, 12, torch.float32, rate=0.3), call_for(solver)
    grad, slope = case.grad.clone(), case.slope.clone()
    grad[0, 3], grad[1, 0] = torch.nan, -torch.inf
    grad[2] = 0
    slope[3] = 0
    grad[4, 2], slope[4] = torch.nan, 0
    outputs = solve(Adjoint(case.weight, slope, grad), call)
    assert outputs.value[:2].isnan().all()
    assert (outputs.status[:2] == Status.NONFINITE).all()
    assert (outputs.iterations[:2] == 0).all()
    assert (outputs.value[2:5] == 0).all()
    assert (outputs.status[2:5] == Status.CONVERGED).all()
    clean = solve(case, call)
    for actual, expected in zip(outputs[:5], clean[:5], strict=True):
        assert torch.equal(actual[5:], expected[5:])


def test_the_length_of_a_gradient_does_not_matter(solve):
    """Powers of two change nothing but the exponent."""
    case = make_adjoint(2, 12, torch.float32, rate=0.4)
    expected = solve(case, CALL)
    for exponent in (-100, 100):
        outputs = solve(Adjoint(case.weight, case.slope, case.grad * 2.0**exponent), CALL)
        assert torch.equal(outputs.value, expected.value * 2.0**exponent)
        assert torch.equal(outputs.residual, expected.residual)


@pytest.mark.parametrize("make", MAKERS, ids=name_of)
@pytest.mark.parametrize("solver", [*SOLVERS[1:4], HeavyBall()], ids=str)
def test_low_precision_products_reach_the_tolerance_in_float32(solver, make, solve):
    case, call = make(2, 40, torch.float32, rate=0.3), call_for(solver, tol=1e-5)
    full, mixed = (
        solve(case, dataclasses.replace(call, precision=p)) for p in ("float32", "mixed")
    )
    check_truth(case, call, mixed)
    assert (mixed.status == Status.CONVERGED).all()
    check_distance(case, mixed, full)
    assert not torch.equal(mixed.value, full.value)  # not float32 under another name
    assert (mixed.iterations - full.iterations).max() <= 4


def test_low_precision_products_on_a_hard_problem_end_as_they_say(solve):
    case = Forward(1.5 * torch.randn(40, 40) / math.sqrt(40), torch.randn(2, 40))
    for solver in (Picard(), Anderson()):
        call = call_for(solver, precision="mixed", max_iter=10)
        outputs = solve(case, call)
        check_truth(case, call, outputs)
        assert (outputs.iterations[outputs.status == Status.MAX_ITER] == 10).all()
