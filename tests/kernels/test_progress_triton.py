"""What counts as progress, when a sample is given up, and which tolerance ends it, in Triton."""

import progress_cases as cases
import pytest
from fastdeq.kernels.steps import engine as steps_engine
from fastdeq.kernels.whole import engine as whole_engine
from triton_solves import Engine, plain

from fastdeq.solvers import Anderson, HeavyBall, Neumann, Picard

ENGINES = {"steps": steps_engine, "whole": whole_engine}


@pytest.fixture(params=ENGINES)
def solve(request, device):
    return Engine(device, ENGINES[request.param])


@pytest.mark.parametrize("solver", [Picard(), Anderson(accelerate_above=0.9)], ids=str)
def test_a_shrinking_state_is_not_given_up(solve, solver):
    cases.check_shrinking(solve, solver, scale=0.7)


def test_falling_norms_are_progress(solve):
    cases.check_falling_norms(solve)


def test_an_equilibrium_at_zero_is_reached(solve):
    cases.check_zero_equilibrium(solve)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), HeavyBall()], ids=str)
def test_the_absolute_tolerance_joins_the_relative_one(solve, solver):
    cases.check_absolute_tolerance(solve, solver)


def test_the_absolute_tolerance_of_an_adjoint(solve):
    cases.check_absolute_tolerance(solve, Neumann(), adjoint=True)


def test_patience_follows_the_limit_or_is_given(solve):
    cases.check_patience(solve)


def test_at_the_rounding_floor_patience_does_not_grow(solve):
    cases.check_rounding_floor(solve)


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
def test_states_whose_squares_overflow_are_solved(solve, solver):
    cases.check_large_states(solve, solver)


def test_after_a_step_taken_back_the_history_refills(solve):
    cases.check_refill(solve, plain)
