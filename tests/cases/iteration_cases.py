"""engine_cases' problems as maps of rows, by the compiled iteration or the loop in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from engine_cases import Adjoint, Call, Case, Forward, Outputs
from torch import Tensor

from fastdeq.activations import ACTIVATIONS
from fastdeq.ops import solve_common
from fastdeq.solution import Solution, Status
from fastdeq.solve import iteration
from fastdeq.solvers import Picard, SolveOptions, Solver, loop

Map = Callable[[Tensor], Tensor]


def as_map(case: Case) -> tuple[Map, Tensor]:
    """f and its start, in the dtype that the solve runs in."""
    dtype = solve_common.working_dtype(*case.tensors())
    w, start = case.weight.to(dtype), case.initial().to(dtype)
    if isinstance(case, Forward):
        c, phi = case.injection.to(dtype), ACTIVATIONS[case.activation].function
        return lambda z: phi(torch.addmm(c, z, w.t())), start
    slope, g = case.slope.to(dtype), case.unit_grad().to(dtype)
    return lambda q: slope * torch.addmm(g, q, w), start


def compiled(
    f: Map,
    start: Tensor,
    solver: Solver,
    parts: Sequence[int] | None = None,
    first: Map | None = None,
    backend: str = "auto",
    **limits,
) -> Solution:
    assert iteration.is_compiled(solver, backend, start)
    with torch.no_grad():
        options = SolveOptions.of(solver, **limits)
        how = (solver, options, parts, first or f)
        return iteration.iterate(f, start, *how, backend=backend)


def by_triton(f: Map, start: Tensor, solver: Solver, *rest, **more) -> Solution:
    """As ``compiled``, by the Triton kernels."""
    return compiled(f, start, solver, *rest, backend="triton", **more)


def contraction(
    device: str, batch: int = 3, size: int = 23, rate: float = 0.6, dtype=torch.float64
) -> tuple[Map, Tensor]:
    """A map that contracts by ``rate``, with a symmetric Jacobian at zero, and a start."""
    w = torch.randn(size, size, dtype=torch.float64)
    w = rate * (w + w.t()) / torch.linalg.matrix_norm(w + w.t(), 2)
    c = torch.randn(batch, size, dtype=torch.float64)
    w, c = w.to(device, dtype), c.to(device, dtype)
    return lambda z: torch.tanh(z @ w + c), c + 1


def by_loop(f: Map, start: Tensor, solver: Solver, **limits) -> Solution:
    """Where f may return the same memory each time."""
    mix = torch.ops.fastdeq.anderson_mix
    with torch.no_grad():
        return loop.solve(lambda z: f(z).clone(), start, solver, anderson_mix=mix, **limits)


def assert_same(actual: Solution, expected: Solution, tol: float = 1e-9) -> None:
    """In float64: the decisions of the loop, and its iterates but for rounding."""
    assert actual.status.tolist() == expected.status.tolist()
    assert actual.iterations.tolist() == expected.iterations.tolist()
    # The iterates differ by rounding alone, which a well conditioned history hardly magnifies.
    torch.testing.assert_close(actual.value, expected.value, rtol=0, atol=tol)
    torch.testing.assert_close(actual.residual, expected.residual, rtol=1e-4, atol=tol)
    for name, counter in expected.rejects.items():
        assert actual.rejects[name].tolist() == counter.tolist()


def check_a_fixed_count(by: Callable[..., Solution], f: Map, start: Tensor, count: int) -> None:
    """``by`` makes so many updates of each sample, and one evaluation more."""
    calls = []

    def counted(z: Tensor) -> Tensor:
        calls.append(0)
        return f(z)

    solver = Picard(fixed_iterations=count)
    actual = by(counted, start, solver, tol=1e-1, max_iter=100)
    assert len(calls) == count + 1
    assert_same(actual, by_loop(f, start, solver, tol=1e-1, max_iter=100))
    assert actual.iterations.tolist() == [count] * len(start)


def check_bad_samples(
    by: Callable[..., Solution], f: Map, start: Tensor, solver: Solver, bad: float, tol: float
) -> None:
    """Sample 2 goes bad at the third evaluation and sample 1 at the fifth: both end with their best
    iterate, and the others are as without them."""
    calls = []

    def spoiled(z: Tensor) -> Tensor:
        value = f(z)
        calls.append(0)
        if len(calls) > 4:
            value[1, 3] = bad
        if len(calls) > 2:
            value[2] = bad
        return value

    actual = by(spoiled, start, solver, tol=tol, max_iter=60)
    calls.clear()
    assert_same(actual, by_loop(spoiled, start, solver, tol=tol, max_iter=60))
    assert Status.NONFINITE in actual.status.tolist()
    assert actual.value.isfinite().all()
    healthy = by(f, start, solver, tol=tol, max_iter=60)
    for b in set(range(len(start))) - {1, 2}:
        assert torch.equal(actual.value[b], healthy.value[b])


def run(case: Case, call: Call, engine: str, backend: str = "auto", device: str = "cpu") -> Outputs:
    """``case`` by the engine "reference" or "iteration", the latter on a device."""
    if engine == "reference":
        return case.run(call, "reference")
    f, start = as_map(case)
    limits = {"tol": call.tol, "atol": call.atol, "max_iter": call.max_iter}
    limits |= {"patience": call.patience, "backend": backend}
    there = lambda z: f(z.cpu()).to(device)  # noqa: E731
    solution = compiled(there, start.to(device), call.solver, **limits)
    value, own = solution.value, case.tensors()[1].dtype
    if isinstance(case, Adjoint):
        value = value.cpu() * case.scale()
    counters = [c.unsqueeze(1) for c in solution.rejects.values()]
    rejects = torch.cat(counters, 1) if counters else solution.iterations.new_empty(len(value), 0)
    found = (value.to(own), solution.status, solution.iterations, solution.residual, rejects)
    return Outputs(*(t.cpu() for t in found))
