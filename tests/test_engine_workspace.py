"""The CPU engine keeps a thread's memory between calls: nothing in it reaches the next result."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_cases import Call
from symmetric_cases import adjoint_at, symmetric_cell

from fastdeq import extension
from fastdeq.affine import encode
from fastdeq.solvers import MINRES, Anderson, Energy, HeavyBall, Neumann, Picard

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)


def every_solve(size, batch=7):
    """Results of both directions by each solver, on a symmetric cell."""
    torch.manual_seed(size)
    case = symmetric_cell(batch, size, 0.9, torch.float32)
    results = []
    for solver in (Picard(), Anderson(), HeavyBall(), Energy(), Energy(momentum=True)):
        for precision in ("float32", "auto"):
            call = Call(solver, 1e-4, 60, precision)
            results.append(case.engine(call).value)
    back = adjoint_at(case, results[0])
    for solver in (Neumann(), Anderson(window=10), MINRES(), MINRES(momentum=True)):
        results.append(back.engine(Call(solver, 1e-4, 60)).value)
    return results


@pytest.mark.parametrize("size", [1, 5, 48, 67, 130])
def test_nothing_is_left_over_from_one_solve_to_the_next(size):
    """A thread's workspace is used again: NaN and huge numbers in it must not be read."""
    first = every_solve(size)
    for other in (size + 3, 2 * size + 1):
        for bad in (torch.nan, 1e30):
            w = torch.full((other, other), bad)
            for solver in (Anderson(), HeavyBall(), Energy()):
                torch.ops.fastdeq.solve_affine(
                    w, torch.ones(9, other), None, "tanh", *encode(solver), 1e-4, 20
                )
            for solver in (Anderson(), MINRES(), MINRES(momentum=True)):
                torch.ops.fastdeq.solve_affine_adjoint(
                    w, torch.ones(9, other), torch.ones(9, other), *encode(solver), 1e-4, 20
                )
    for a, b in zip(first, every_solve(size), strict=True):
        assert torch.equal(a, b)


def test_threads_have_workspaces_of_their_own():
    sizes = [5, 67, 130, 48]
    expected = [every_solve(size) for size in sizes]
    lock = threading.Lock()  # for torch's random numbers

    def run(size):
        with lock:
            torch.manual_seed(size)
            case = symmetric_cell(7, size, 0.9, torch.float32)
        return [case.engine(Call(solver, 1e-4, 60)).value for solver in (Anderson(), Energy())]

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for results, known in zip(pool.map(run, sizes), expected, strict=True):
                assert torch.equal(results[0], known[2])
                assert torch.equal(results[1], known[6])
