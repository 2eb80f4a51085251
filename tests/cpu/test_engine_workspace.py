"""The CPU engine keeps a thread's memory between calls: nothing in it reaches the next result."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_cases import Call
from symmetric_cases import adjoint_at, symmetric_cell

from fastdeq.backends import extension
from fastdeq.solvers import MINRES, Anderson, Energy, HeavyBall, Neumann, Picard

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)


FORWARD = (Picard(), Anderson(), HeavyBall(), Energy(), Energy(momentum=True))
ADJOINT = (Neumann(), Anderson(window=10), MINRES(), MINRES(momentum=True))


def solves(size, batch=7):
    """Solves in both directions by each solver, on a symmetric cell, as functions."""
    torch.manual_seed(size)
    case = symmetric_cell(batch, size, 0.9, torch.float32)
    back = adjoint_at(case, case.engine(Call(Picard(), 1e-4, 60)).value)
    return [
        functools.partial(run, problem, solver, precision)
        for problem, solvers in ((case, FORWARD), (back, ADJOINT))
        for solver in solvers
        for precision in ("float32", "auto")
    ]


def run(problem, solver, precision):
    return problem.engine(Call(solver, 1e-4, 60, precision)).value


def in_poisoned_memory(solve):
    """In a thread of its own, whose fresh workspace holds NaN throughout."""
    torch.use_deterministic_algorithms(True)  # with which torch.empty is filled
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(solve).result()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [1, 5, 48, 67, 130])
def test_nothing_is_read_that_was_not_written(size):
    """A thread's workspace is used again, for other sizes and solvers."""
    for solve in solves(size):
        assert torch.equal(in_poisoned_memory(solve), solve())


def test_threads_have_workspaces_of_their_own():
    sizes = [5, 67, 130, 48]
    expected = [[solve() for solve in solves(size)] for size in sizes]
    lock = threading.Lock()  # for torch's random numbers

    def solve_some(size):
        with lock:
            torch.manual_seed(size)
            case = symmetric_cell(7, size, 0.9, torch.float32)
        return [run(case, solver, "float32") for solver in (Anderson(), Energy())]

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for results, known in zip(pool.map(solve_some, sizes), expected, strict=True):
                assert torch.equal(results[0], known[2])
                assert torch.equal(results[1], known[6])
