"""What counts as progress, when a sample is given up, and which tolerance ends it, on an emulated
GPU."""

import shutil

import progress_cases as cases
import pytest
import torch
from cuda_persistent_emulation import COMPILER, Emulation

from fastdeq.solvers import Anderson, HeavyBall, Neumann, Picard

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})"
)


@pytest.fixture(scope="module")
def solve():
    return Emulation().solve


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shrinking_state_is_not_given_up(solve, dtype):
    cases.check_shrinking(solve, Picard(), scale=0.7, dtype=dtype)


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
    cases.check_refill(solve, lambda case, call: case.run(call, "reference"))
