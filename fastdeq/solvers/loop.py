"""The one iteration loop in Python, for every solver and every map: the specification of every
engine.

z       (B, n)  point of evaluation       f(z)  its value
rho     (B,)    |f(z) - z| / (|f(z)| + eps), judged only where the point is an iterate

Per sample: a running mask, the best verified iterate, a status, a count. A sample that stops is
frozen: its point no longer changes, so nothing that happens to it later can reach its result.

An iterate is the best so far where its relative residual is below that of the last one that was, or
its residual norm ``|f(z) - z|`` below those of all that were: while a state shrinks towards an
equilibrium near zero the relative residual stands still, and while it grows the norm does. A sample
is given up after so many other iterates in a row as ``patience`` says, unless its norms still fall:
the least of each half of the patience is compared with that of the half before. At the rounding
floor patience does not grow with the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..constants import (
    PATIENCE,
    RESIDUAL_EPS,
    ROUNDING_FLOOR,
    SIZE_EXPONENT,
    STILL_FALLING,
)
from ..cuda_stream import DelayedCount, is_capturing
from ..solution import Solution, Status
from .base import AffineMap, Problem, Solver
from .gmres import gmres_step
from .picard import Picard
from .solve_options import scaled_patience

# Plain integers keep the int8 of a status tensor.
_CONVERGED, _STAGNATED = int(Status.CONVERGED), int(Status.STAGNATED)
_NONFINITE = int(Status.NONFINITE)


#: Hears how many samples go on at most, and what says which, int64 in ascending order, for which
#: it waits for a device.
Follow = Callable[[int, Callable[[], Tensor]], None]


def _samples(running: Tensor) -> Tensor:
    return running.nonzero().flatten()


def finite_rows(start: Tensor) -> Tensor:
    """``start`` with the rows that are not finite replaced by zeros."""
    return torch.where(start.isfinite().all(1, keepdim=True), start, 0.0)


def _norms(
    difference: Tensor, value: Tensor, largest: float, looks: bool
) -> tuple[Tensor, Tensor, bool]:
    """2-norms ``(B,)`` of rows ``(B, n)``, also where squares of the entries leave the dtype; and
    whether it is known that all are below ``largest``, by a look where it ``looks``."""
    rows, dtype = (difference, value), value.dtype
    if looks or dtype == torch.float64:
        norm, size = (torch.linalg.vector_norm(r, dim=1) for r in rows)
        if looks and (norm + size).sum().item() < largest:
            return norm, size, True
        if dtype == torch.float64:
            return norm, size, False
    # A CUDA kernel widens entry by entry.
    norm, size = (torch.linalg.vector_norm(r, dim=1, dtype=torch.float64) for r in rows)
    return norm.to(dtype), size.to(dtype), False


def _largest_entry(rows: Tensor) -> Tensor:
    return rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


class Residual(NamedTuple):
    """Of an evaluation ``(B,)``: ``|f(z) - z|``, the same relative to ``|f(z)|``, the relative
    residual at which the sample has converged, and whether all are surely finite. ``relative`` is
    NaN where ``|f(z)|`` is next to infinity: there every residual would be small."""

    norm: Tensor
    relative: Tensor
    limit: Tensor | float
    finite: bool


def residual_of(
    value: Tensor,
    point: Tensor,
    tol: float,
    atol: float,
    parts: Sequence[int] | None,
    looks: bool,
    stop_norm: str = "2",
) -> Residual:
    """Of ``value = f(point)``, both ``(B, n)``, or of the worst of ``parts``. The relative residual
    and its limit are in ``stop_norm``."""
    difference = value - point
    largest = torch.finfo(value.dtype).max ** SIZE_EXPONENT
    norm, size, finite = _norms(difference, value, largest, looks)
    size = size + RESIDUAL_EPS
    limit: Tensor | float = tol + atol / size if atol else tol
    if parts is None and stop_norm == "2":
        relative = norm / size
    else:  # that of the part which is furthest from its limit
        parts = parts or [point.shape[1]]
        pairs = zip(difference.split(parts, 1), value.split(parts, 1), strict=True)
        if stop_norm == "2":
            norms = [_norms(*pair, largest, looks)[:2] for pair in pairs]
        else:
            norms = [(_largest_entry(d), _largest_entry(v)) for d, v in pairs]
        ratios = torch.stack([n / (s + RESIDUAL_EPS) for n, s in norms], 1)
        limits = torch.stack([tol + atol / (s + RESIDUAL_EPS) for _, s in norms], 1)
        worst = (ratios - limits).argmax(1, keepdim=True)
        relative = ratios.gather(1, worst)[:, 0]
        limit = limits.gather(1, worst)[:, 0] if atol else tol
    if not finite:
        relative = torch.where(size < largest, relative, torch.nan)
    return Residual(norm, relative, limit, finite)


def solve(
    f: Callable[[Tensor], Tensor],
    start: Tensor,
    solver: Solver,
    *,
    tol: float,
    max_iter: int,
    anderson_mix: Callable[..., Any],
    gmres_step: Callable[..., Any] = gmres_step,
    start_value: Tensor | None = None,
    atol: float = 0.0,
    patience: int | None = None,
    parts: Sequence[int] | None = None,
    follow: Follow | None = None,
    min_iter: int = 0,
    stop_norm: str = "2",
    begin: Any = None,
    hands_on: bool = False,
) -> Solution:
    """Solves ``z = f(z)`` for each row of ``start`` ``(B, n)`` float32 or float64.

    Converged is ``|f(z) - z| <= atol + tol |f(z)|``; where rows have ``parts`` of so many entries,
    for each of them; in 2-norms or, with ``stop_norm="max"``, by largest entries. ``patience`` is
    the solver's, scaled to ``max_iter``, unless it is given.
    ``f`` maps ``(B, n)`` to ``(B, n)`` and treats rows independently; ``start_value`` is
    ``f(start)`` where it is known. At most ``max_iter`` updates, hence ``max_iter + 1``
    evaluations: the last one verifies. Rows of ``start`` that are not finite start from zero.
    ``follow`` hears after each evaluation which samples go on; the values of the others may be any
    finite ones from then on.

    No sample converges or stagnates before ``min_iter`` updates. The solver begins with ``begin``,
    which a solve that ``hands_on`` left in its solution's ``kept``.

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
    least = half_before = half_now = best_residual  # norms
    status = torch.full((batch,), Status.MAX_ITER, dtype=torch.int8, device=point.device)
    iterations = torch.zeros(batch, dtype=torch.int32, device=point.device)
    idle = torch.zeros_like(iterations)  # iterates in a row that were not the best so far
    running = torch.ones(batch, dtype=torch.bool, device=point.device)
    judged = running  # running samples whose point is an iterate
    best_limit: Tensor | float = tol  # the best iterate meets the tolerance where it is below that
    patience = scaled_patience(solver.patience, max_iter) if patience is None else patience
    half = max(patience // 2, 1)
    floor = ROUNDING_FLOOR * torch.finfo(point.dtype).eps
    damping = solver.damping if isinstance(solver, Picard) else None
    rate = before = torch.full_like(best_residual, torch.nan)
    affine = f if isinstance(f, AffineMap) else None
    how = (tol, atol, max_iter, anderson_mix, gmres_step, affine, begin)
    state = solver.init(point, Problem(*how))
    looks = point.device.type == "cpu" and not fixed and not torch.compiler.is_compiling()
    # Frozen samples make an iteration too many harmless.
    count = DelayedCount(point.device, batch)

    if batch == 0:
        max_iter = -1
    for k in range(max_iter + 1):
        value = start_value if k == 0 and start_value is not None else f(point)
        norm, relative, limit, finite = residual_of(
            value, point, tol, atol, parts, looks, stop_norm
        )

        # Comparisons with NaN are false.
        lower = norm < least if finite else (norm < least) & relative.isfinite()
        improved = judged & ((relative < best_residual) | lower)
        if isinstance(limit, Tensor):  # the norms of two iterates may both be lower
            improved = improved | (judged & (relative <= limit) & (best_residual > best_limit))
        if fixed or min_iter:  # what meets the tolerance gives way to nothing else
            improved = improved & ((relative <= limit) | (best_residual > best_limit))
        best = torch.where(improved.unsqueeze(1), point, best)
        best_residual = torch.where(improved, relative, best_residual)
        if isinstance(limit, Tensor):
            best_limit = torch.where(improved, limit, best_limit)
        idle = torch.where(improved, 0, idle + judged)
        seen = norm if judged is running else torch.where(judged, norm, torch.inf)
        least, half_now = torch.fmin(seen, least), torch.fmin(seen, half_now)
        if damping is not None:  # of plain steps, which show how the map contracts
            rate = torch.where(judged, norm / before, rate)
            before = norm
        if not fixed and k >= min_iter:
            running = running & (best_residual > best_limit)
        if k == max_iter or (not fixed and not (left := count.left(running))):
            break
        if follow is not None and not fixed:
            follow(left, partial(_samples, running))

        step = solver.step(state, point, value, norm, running)
        failed = running & step.failed
        status = torch.where(failed, _NONFINITE, status)
        running = running & ~failed
        if step.stalled is not None:
            stalled = running & step.stalled
            status = torch.where(stalled, _STAGNATED, status)
            running = running & ~stalled
        if (
            k >= max(PATIENCE, min_iter) and not fixed
        ):  # earlier, no sample can have been idle for so long
            stagnated = running & (idle >= PATIENCE) & (best_residual < floor)
            status = torch.where(stagnated, _STAGNATED, status)
            running = running & ~stagnated
        if k >= max(half, min_iter) and not fixed:
            due = judged & (idle % half == 0)
            falls = half_now < STILL_FALLING * half_before
            stagnated = running & due & (idle >= patience) & ~falls
            status = torch.where(stagnated, _STAGNATED, status)
            running = running & ~stagnated
            half_before = torch.where(due, half_now, half_before)
            half_now = torch.where(due, torch.inf, half_now)
        point = torch.where(running.unsqueeze(1), step.point, point)
        judged = running if step.iterate is None else running & step.iterate
        iterations = iterations + running

    status = torch.where(best_residual <= best_limit, _CONVERGED, status)
    return Solution(
        best,
        status,
        iterations,
        best_residual,
        dict(zip(solver.rejects, solver.counters(state), strict=True)),
        observed_contraction=None if damping is None else (rate - (1 - damping)) / damping,
        evaluations=k + 1 if batch else 0,
        sample_evaluations=(k + 1) * batch if batch else 0,
        path="general",
        kept=solver.kept(state) if hands_on else None,  # type: ignore[attr-defined]
    )
