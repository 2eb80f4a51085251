"""The forward solve alone, on each engine, against its floor.

``latency`` is one call, from an idle device to its end, with the host's part of it. ``queued`` is
per call of a full queue, so without the host's part; it is taken of engines that make a whole solve
in one launch, for which nothing else lies between the two but the launch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contestants import FastDEQ
from gpu_clock import Clock
from gpu_contestants import GPU_ENGINES, DeviceProblem
from gpu_floor import Ceilings, forward_floor

from fastdeq.solvers import SolveOptions, resolve

ONE_LAUNCH = ("persistent", "whole")
_CALLS = 20


def engine_times(
    problem: DeviceProblem,
    clock: Clock,
    ceilings: Ceilings,
    settled: set[str],
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """By engine, and for the reference: milliseconds and floors.

    Engines whose contestant is not among ``settled`` are left out: they gave no right answer.
    ``announce`` is told the contestant whose turn it is.
    """
    with problem.x.device:
        layer = FastDEQ(problem, problem.spec.tol, problem.spec.tol).layer
    with torch.no_grad():
        weight, c = layer.cell.recurrent_weight(), layer.cell.injection(problem.x)
    tol, structure = problem.spec.tol, layer.cell.structure()
    solver = resolve("auto", structure, tol, adjoint=False)
    how = SolveOptions.of(solver, tol=tol, max_iter=layer.options.max_iter).arguments
    tensors = (weight.detach(), c, None, problem.spec.activation, False, None, False)
    engines = {"fastdeq-reference": "reference"}
    engines |= {f"fastdeq-{e.backend}-{e.name}": e.name for e in GPU_ENGINES}
    times = {}
    for contestant in filter(settled.__contains__, engines):
        announce(contestant)
        name = engines[contestant]
        try:
            solve = partial(torch.ops.fastdeq.solve_affine.default, *tensors, name, *how)
            times[name] = _timed(name, solve, problem, clock, ceilings)
        except Exception as error:  # an engine's failure is a result
            times[name] = {"left_out": clock.survived(error)}
    return times


def _timed(
    name: str,
    solve: Callable[[], tuple[torch.Tensor, ...]],
    problem: DeviceProblem,
    clock: Clock,
    ceilings: Ceilings,
) -> dict[str, Any]:
    spec = problem.spec
    iterations = solve()[2]
    products = float(iterations.sum())
    floor = forward_floor(spec.d, spec.batch, products, False, ceilings)
    latency = clock.median(solve, 15)
    found: dict[str, Any] = {
        "products": products,
        "worst": int(iterations.max()),
        "latency_ms": 1e3 * latency,
        "floor_ms": floor._asdict(),
    }
    if name in ONE_LAUNCH:
        found["queued_ms"] = 1e3 * clock.queued(solve, _CALLS)
    return found
