"""A solve whose early evaluations are in bfloat16, under autocast, and the others in the cell's own
precision.

The first evaluation is in full precision: what a cell caches then stays exact. Those that follow
are in bfloat16 until the residuals reach what bfloat16 can tell from zero, or stop falling. From
the best iterates a solve in full precision goes on, with a history of its own, because differences
of values in two precisions are mostly rounding. Each residual that is reported is from there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from ..solution import Solution, may_look
from ..solvers import SolveOptions
from .compaction import autocasts
from .packing import Packing
from .spec import Map, SolveSpec

#: The relative residual at which full precision takes over: bfloat16 has 8 bits. Measured for a
#: convolution of 2 ms: 2**-4 to 2**-6 leave more to do in full precision, 2**-8 is not reached.
LOW_TOL = 2.0**-7
#: Iterates in a row without progress after which a sample has seen what bfloat16 can give.
LOW_PATIENCE = 4


def has_low_precision(packing: Packing) -> bool:
    """Whether evaluations in bfloat16 may be faster for these states than those of their own; not
    where they are in half precision already.

    Raises:
        BackendError: float64 states, which autocast leaves as they are.
    """
    if packing.dtype == torch.float64:
        raise BackendError(
            "precision='mixed' evaluates a cell under autocast, which leaves float64 as it is; the "
            "state is float64. Use float32, or precision='auto'."
        )
    own = all(dtype == torch.float32 for dtype in packing.dtypes)
    return own and not autocasts(packing.device.type)


def in_bfloat16(f: Map, device_type: str) -> Map:
    """f under autocast."""

    def run(rows: Tensor) -> Tensor:
        with torch.autocast(device_type, dtype=torch.bfloat16):
            return f(rows)

    return run


class Latest:
    """A map of rows, and its latest value."""

    def __init__(self, f: Map):
        self._f = f
        self._value: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        self._value = value = self._f(rows)
        return value

    def stepped(self, begun: Solution, options: SolveOptions) -> Solution:
        """The solution of the first part, one plain step further where it converged: its latest
        value is there already. Not where an update more were too many."""
        value = self._value
        if value is None or options.fixed_iterations or options.max_iter < 4:
            return begun
        steps = begun.converged
        at = torch.where(steps.unsqueeze(1), value.detach().to(begun.value.dtype), begun.value)
        return replace(begun, value=at, iterations=begun.iterations + steps)


def low_part(spec: SolveSpec) -> SolveSpec | None:
    """The part of a solve that is in bfloat16; None where it has no room for one."""
    if getattr(spec.solver, "fixed_iterations", 0) != spec.options.fixed_iterations:
        return None  # a solver of one's own, which has its own count
    fixed = spec.options.fixed_iterations // 2
    limit = spec.options.max_iter // 2
    if (fixed if spec.options.fixed_iterations else limit) == 0:
        return None
    options = replace(
        spec.options,
        tol=max(spec.options.tol, LOW_TOL),
        max_iter=max(limit, 1),
        patience=min(spec.options.patience, LOW_PATIENCE),
        fixed_iterations=fixed,
        min_iter=0,
    )
    return _with(spec, options)


def full_part(spec: SolveSpec, begun: Solution) -> SolveSpec:
    """What is left of the solve after ``begun``."""
    fixed = spec.options.fixed_iterations
    if fixed:
        return _with(spec, replace(spec.options, fixed_iterations=fixed - fixed // 2))
    used = int(begun.iterations.max()) if may_look(begun.iterations) and len(begun.status) else 0
    limit = max(spec.options.max_iter - used, 1)
    least = spec.options.min_iter
    if least:  # of the sample that has made the fewest
        least = min(max(least - (int(begun.iterations.min()) if used else 0), 0), limit)
    return _with(spec, replace(spec.options, max_iter=limit, min_iter=least))


def together(begun: Solution, rest: Solution) -> Solution:
    """The solution of both parts."""
    low = begun.evaluations or 0
    return replace(
        rest,
        iterations=begun.iterations + rest.iterations,
        rejects={name: count + begun.rejects[name] for name, count in rest.rejects.items()},
        evaluations=low + (rest.evaluations or 0),
        sample_evaluations=(begun.sample_evaluations or 0) + (rest.sample_evaluations or 0),
        narrow_evaluations=max(low - 1, 0),
    )


def _with(spec: SolveSpec, options: SolveOptions) -> SolveSpec:
    solver: Any = spec.solver
    if options.fixed_iterations:
        solver = replace(solver, fixed_iterations=options.fixed_iterations)
    return replace(spec, solver=solver, options=options)
