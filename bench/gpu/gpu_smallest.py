"""A few small solves on each engine, for a memory checker, which makes everything slow.

    compute-sanitizer --tool memcheck python bench/gpu/gpu_smallest.py
    compute-sanitizer --tool racecheck python bench/gpu/gpu_smallest.py --engine persistent

Sizes lie around the edges of tiles. Answers are compared with the reference on the CPU, so
that a run that computes nothing is noticed. Exit status: 0, 1 for a wrong answer, 4 where no engine
ran.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from fastdeq import Anderson, Picard
from fastdeq.backends import choose
from fastdeq.backends.device import gpu_of
from fastdeq.solvers import SolveOptions

SHAPES = ((1, 1), (17, 3), (64, 33), (130, 70))  # d, B
TOL = 1e-5
CONTRACTION = 0.5
# The engine's and the reference's iterate are each tol / (1 - s) of |z| away from the solution, the
# adjoint's slopes as much again: 4 tol / (1 - s)^2 and rounding.
ALLOWED = 5 * TOL / (1 - CONTRACTION) ** 2
NOTHING_RAN = 4


def _inputs(d: int, batch: int) -> dict[str, Tensor]:
    weight = torch.randn(d, d)
    weight *= CONTRACTION / torch.linalg.matrix_norm(weight, 2)
    return {"weight": weight, "c": torch.randn(batch, d), "grad": torch.randn(batch, d)}


def _why_not(engine: choose.Engine, d: int, batch: int, solver: Any, at: torch.device) -> str:
    options = SolveOptions.of(solver, tol=TOL, max_iter=100)
    request = choose.Request(at.type, torch.float32, d, batch, options, engine.backend, gpu_of(at))
    try:
        return engine.why_not(request)
    except (ImportError, AttributeError) as error:
        return f"it is not there: {error}"


def _far(found: Tensor, expected: Tensor) -> float:
    distance = (found.cpu().double() - expected.double()).norm() / expected.double().norm()
    return float(distance.nan_to_num(nan=torch.inf))


def _solves(engine: str, d: int, batch: int, solver: Any, device: str) -> float:
    """The larger relative error of a forward solve and its adjoint."""
    inputs = _inputs(d, batch)
    there = {name: t.to(device) for name, t in inputs.items()}
    how = SolveOptions.of(solver, tol=TOL, max_iter=100).arguments

    def solve(tensors: dict[str, Tensor], engine: str) -> tuple[Tensor, Tensor]:
        weight, ops = tensors["weight"], torch.ops.fastdeq
        z, *_, slope = ops.solve_affine(
            weight, tensors["c"], None, "tanh", True, None, False, engine, *how
        )
        q, *_ = ops.solve_affine_adjoint(weight, slope, tensors["grad"], None, False, engine, *how)
        return z, q

    pairs = zip(solve(there, engine), solve(inputs, "reference"), strict=True)
    return max(_far(found, expected) for found, expected in pairs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", help="only this one")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    chosen = [e for e in choose.ENGINES if e.backend in ("cuda", "triton")]
    chosen = [e for e in chosen if options.engine in (None, e.name)]
    ran, wrong = 0, 0
    for engine, (d, batch), solver in itertools.product(chosen, SHAPES, (Picard(), Anderson())):
        what = f"{engine.backend} {engine.name}, {solver.name}, d {d}, B {batch}"
        reason = _why_not(engine, d, batch, solver, torch.device(options.device))
        if reason:
            print(f"{what}: not run, {reason}")
            continue
        error = _solves(engine.name, d, batch, solver, options.device)
        ran, wrong = ran + 1, wrong + (error > ALLOWED)
        print(f"{what}: {error:.1e}" + (" WRONG" if error > ALLOWED else ""))
    print(f"{ran} ran, {wrong} wrong")
    return (1 if wrong else 0) if ran else NOTHING_RAN


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
