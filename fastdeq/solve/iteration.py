"""The iteration of any map with compiled code: one call between two evaluations.

``solvers/loop.py`` is the specification; csrc/cpu/iteration.cpp has the steps of plain, heavy-ball
and Anderson iteration for tensors on a CPU, kernels/iteration those for tensors on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import extension
from ..solution import Solution
from ..solvers import SOLVERS, SolveOptions, Solver
from ..solvers.loop import Follow
from . import triton_iteration
from .packing import RowMap
from .trend import Trend

_SOLVERS = ("picard", "neumann", "anderson", "heavy_ball")


def is_compiled(solver: Solver, backend: str, start: Tensor) -> bool:
    """Whether there is compiled code for the iterations of ``solver`` from rows like ``start``
    ``(B, n)``."""
    if (
        solver.name not in _SOLVERS
        or SOLVERS.get(solver.name) is not type(solver)
        or torch.compiler.is_compiling()
        or start.numel() == 0
    ):
        return False
    if triton_iteration.supports(solver, backend, start):
        return True
    return (
        extension.module is not None
        and backend in ("auto", "cpp")
        and bool(extension.module.Iteration.supports(start))
    )


def iterate(
    f: Callable[[Tensor], Tensor | None],
    start: Tensor,
    solver: Solver,
    options: SolveOptions,
    parts: Sequence[int] | None,
    first: Callable[[Tensor], Tensor | None],
    offset: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
    follow: Follow | None = None,
) -> Solution:
    """``loop.solve`` of a solver that :func:`is_compiled`; ``first`` makes the first evaluation.

    Where there is an ``offset`` ``(B, n)``, ``scale`` ``(B,)`` times it is added to each value. A
    value None stands for zeros.

    ``f`` sees the memory of the iteration, ``(B, n)``, which later steps write to. A point that it
    keeps is left to it; it must not write there itself. Where it takes parts, each has memory of
    its own, and what it returns is read where it lies. ``follow`` hears after each evaluation how
    many samples go on, and which; values of the others are not read.
    """
    sizes = [start.shape[1]] if parts is None else list(parts)
    by_parts = f if isinstance(f, RowMap) and f.takes_parts and len(sizes) > 1 else None
    iteration: Any
    if triton_iteration.supports(solver, backend, start):
        by_parts = None
        kind = triton_iteration.kind()
        iteration = kind(start, options, sizes, offset, scale, follow is not None)
    else:
        assert extension.module is not None
        kind = extension.module.Iteration
        iteration = kind(start, options, sizes, offset, scale, by_parts is not None)
    left = iteration.advance(_resolved(first(iteration.point())))
    evaluations = 1
    # Nothing here holds a point, or a value until the next one is there.
    while left:
        evaluations += 1
        if follow is not None and not options.fixed_iterations:
            follow(left, iteration.running)
        if by_parts is not None:
            values = by_parts.of_parts(iteration.points())
            left = iteration.advance([_resolved(v) for v in values])
            del values
        else:
            left = iteration.advance(_resolved(f(iteration.point())))
    best, status, iterations, residual, rejects, rate, middle, end = iteration.result()
    plain = options.window == 0 and solver.name != "heavy_ball"
    damping = options.damping
    return Solution(
        best,
        status,
        iterations,
        residual,
        dict(zip(solver.rejects, rejects.unbind(1), strict=True)),
        solver=solver,
        observed_contraction=(rate - (1 - damping)) / damping if plain else None,
        trend=Trend(middle, end) if options.window else None,
        evaluations=evaluations,
        sample_evaluations=evaluations * len(start),
        path="general",
    )


def _resolved(value: Tensor | None) -> Tensor | None:
    """The numbers of a value whose negation was put off, as that of ``conj().imag`` is."""
    return value.resolve_neg() if value is not None and value.is_neg() else value
