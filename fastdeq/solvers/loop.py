"""The one iteration loop in Python, for every solver and every map: the specification of every
engine.

z       (B, n)  point of evaluation       f(z)  its value
rho     (B,)    |f(z) - z| / (|f(z)| + eps), judged only where the point is an iterate

Per sample: a running mask, the best verified iterate, a status, a count. A sample that stops is
frozen: its point no longer changes, so nothing that happens to it later can reach its result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..constants import RESIDUAL_EPS
from ..cuda_stream import DelayedFlag, is_capturing
from ..solution import Solution, Status
from .base import AffineMap, Problem, Solver

# Plain integers keep the int8 of a status tensor.
_CONVERGED, _STAGNATED = int(Status.CONVERGED), int(Status.STAGNATED)
_NONFINITE = int(Status.NONFINITE)


def finite_rows(start: Tensor) -> Tensor:
    """``start`` with the rows that are not finite replaced by zeros."""
    return torch.where(start.isfinite().all(1, keepdim=True), start, 0.0)


def solve(
    f: Callable[[Tensor], Tensor],
    start: Tensor,
    solver: Solver,
    *,
    tol: float,
    max_iter: int,
    anderson_mix: Callable[..., Any],
    start_value: Tensor | None = None,
) -> Solution:
    """Solves ``z = f(z)`` for each row of ``start`` ``(B, n)`` float32 or float64.

    ``f`` maps ``(B, n)`` to ``(B, n)`` and treats rows independently; ``start_value`` is
    ``f(start)`` where it is known. At most ``max_iter`` updates, hence ``max_iter + 1``
    evaluations: the last one verifies. Rows of ``start`` that are not finite start from zero.

    A solver with ``fixed_iterations`` makes exactly so many updates of every sample that stays
    finite, and nothing is read from the device; otherwise the host waits in each
    iteration for the one before at most, and a CUDA device never waits for the host.
    """
    if getattr(solver, "waits", False) and is_capturing(start.device):
        raise RuntimeError(
            f"solver {solver.name!r} in plain PyTorch reads from the device, which a CUDA graph "
            "cannot record; use 'picard', 'neumann', 'anderson' or 'heavy_ball'."
        )
    fixed: int = getattr(solver, "fixed_iterations", 0)
    max_iter = fixed or max_iter
    batch = start.shape[0]
    point = finite_rows(start)
    best = point
    best_residual = point.new_full((batch,), torch.inf)
    status = torch.full((batch,), Status.MAX_ITER, dtype=torch.int8, device=point.device)
    iterations = torch.zeros(batch, dtype=torch.int32, device=point.device)
    idle = torch.zeros_like(iterations)  # iterates in a row that brought no new best residual
    running = torch.ones(batch, dtype=torch.bool, device=point.device)
    judged = running  # running samples whose point is an iterate
    affine = f if isinstance(f, AffineMap) else None
    state = solver.init(point, Problem(tol, max_iter, anderson_mix, affine))
    # Frozen samples make an iteration too many harmless.
    flag = DelayedFlag(point.device)

    if batch == 0:
        max_iter = -1
    for k in range(max_iter + 1):
        value = start_value if k == 0 and start_value is not None else f(point)
        norm = torch.linalg.vector_norm(value - point, dim=1)
        size = torch.linalg.vector_norm(value, dim=1)
        relative = norm / (size + RESIDUAL_EPS)

        # False for NaN, and where |f(z)|^2 overflows before |f(z) - z|^2 does: next to infinity
        # every residual would be small.
        improved = judged & (relative < best_residual) & (size < torch.inf)
        best = torch.where(improved.unsqueeze(1), point, best)
        best_residual = torch.where(improved, relative, best_residual)
        idle = torch.where(improved, 0, idle + judged)
        if not fixed:
            running = running & (best_residual > tol)
        if k == max_iter or (not fixed and not flag.goes_on(running.any())):
            break

        step = solver.step(state, point, value, norm, running)
        failed = running & step.failed
        status = torch.where(failed, _NONFINITE, status)
        running = running & ~failed
        if step.stalled is not None:
            stalled = running & step.stalled
            status = torch.where(stalled, _STAGNATED, status)
            running = running & ~stalled
        if k >= solver.patience and not fixed:  # earlier, no sample can have been idle for so long
            stagnated = running & (idle >= solver.patience)
            status = torch.where(stagnated, _STAGNATED, status)
            running = running & ~stagnated
        point = torch.where(running.unsqueeze(1), step.point, point)
        judged = running if step.iterate is None else running & step.iterate
        iterations = iterations + running

    status = torch.where(best_residual <= tol, _CONVERGED, status)
    return Solution(
        best,
        status,
        iterations,
        best_residual,
        dict(zip(solver.rejects, solver.counters(state), strict=True)),
    )
