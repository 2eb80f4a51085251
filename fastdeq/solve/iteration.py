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
from . import triton_iteration
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
) -> Solution:
    """``loop.solve`` of a solver that :func:`is_compiled`; ``first`` makes the first evaluation.

    Where there is an ``offset`` ``(B, n)``, ``scale`` ``(B,)`` times it is added to each value. A
    value None stands for zeros.

    ``f`` sees the memory of the iteration, ``(B, n)``, which later steps write to. A point that it
    keeps is left to it; it must not write there itself.
    """
    sizes = [start.shape[1]] if parts is None else list(parts)
    kind = _kind(solver, backend, start)
    iteration = kind(start, options, sizes, offset, scale)
    value = _resolved(first(iteration.point()))  # nothing here holds a point
    while iteration.advance(value):
        del value  # a state that need not wait for the next one
        value = _resolved(f(iteration.point()))
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
    )


def _kind(solver: Solver, backend: str, start: Tensor) -> Any:
    if triton_iteration.supports(solver, backend, start):
        return triton_iteration.kind()
    assert extension.module is not None
    return extension.module.Iteration


def _resolved(value: Tensor | None) -> Tensor | None:
    """The numbers of a value whose negation was put off, as that of ``conj().imag`` is."""
    return value.resolve_neg() if value is not None and value.is_neg() else value
