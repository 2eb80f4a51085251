"""engine_cases' problems as maps of rows, by the compiled iteration or the loop in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from engine_cases import Adjoint, Call, Case, Forward, Outputs
from torch import Tensor

from fastdeq.activations import ACTIVATIONS
from fastdeq.ops import solve_common
from fastdeq.solution import Solution
from fastdeq.solve import iteration
from fastdeq.solvers import SolveOptions, Solver, loop

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
    **limits,
) -> Solution:
    assert iteration.is_compiled(solver, "auto", start)
    with torch.no_grad():
        options = SolveOptions.of(solver, **limits)
        return iteration.iterate(f, start, solver, options, parts, first or f)


def by_loop(f: Map, start: Tensor, solver: Solver, **limits) -> Solution:
    """Where f may return the same memory each time."""
    mix = torch.ops.fastdeq.anderson_mix
    with torch.no_grad():
        return loop.solve(lambda z: f(z).clone(), start, solver, anderson_mix=mix, **limits)


def run(case: Case, call: Call, engine: str) -> Outputs:
    """``case`` by the engine "reference" or "iteration"."""
    if engine == "reference":
        return case.run(call, "reference")
    f, start = as_map(case)
    limits = {"tol": call.tol, "atol": call.atol, "max_iter": call.max_iter}
    solution = compiled(f, start, call.solver, patience=call.patience, **limits)
    value, own = solution.value, case.tensors()[1].dtype
    if isinstance(case, Adjoint):
        value = value * case.scale()
    counters = [c.unsqueeze(1) for c in solution.rejects.values()]
    rejects = torch.cat(counters, 1) if counters else solution.iterations.new_empty(len(value), 0)
    return Outputs(value.to(own), solution.status, solution.iterations, solution.residual, rejects)
