"""The reversible iteration and its exact gradient, in memory that does not depend on its length.

With relaxation b, from ``y_0 = z_0``, an update of a sample that goes on is

    y_(k+1) = (1 - b) y_k + b f(z_k)            z_(k+1) = (1 - b) z_k + b f(y_(k+1))

and the inverse of it ``z_k = (z_(k+1) - b f(y_(k+1))) / (1 - b)``, then y_k in the same way. A
sample stops at its own count n, where ``|f(z_n) - z_n|`` meets the tolerance, and is frozen. With
cotangents v of y_(k+1) and w of z_(k+1), the backward pass makes, for each sample with ``k < n``,

    v <- v + b J(y_(k+1))^T w,   w <- (1 - b) w + b J(z_k)^T v,   v <- (1 - b) v

and adds up the same products with df/dtheta. Both states are kept in float64, whatever the map's
dtype. Rounding still grows by up to ``(1 + b |J|) / (1 - b)`` in each half of an inverted update,
so four projections of every z_k, kept from the forward pass, say how far off the one is that was
reconstructed. Where that is more than ``_LOST |z_n|`` the sample's backward pass ends. The
residual of the adjoint solution estimates the relative error of the gradient: the largest of
``off |(v, w)| / |g|`` on the way, and ``|(v, w)| / |g|`` where it ended early.

Source: "Reversible Deep Equilibrium Models", 2025, arXiv 2509.12917.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..constants import RESIDUAL_EPS
from ..solution import Solution, Status
from ..solvers.loop import finite_rows, residual_of
from .closure import cut_above, evaluate, placed_above, same_closure
from .spec import Map, Report, SolveSpec

_CONVERGED, _NONFINITE = int(Status.CONVERGED), int(Status.NONFINITE)
_LOST = 1.0
_PROJECTIONS = 4


@dataclass(frozen=True, eq=False)
class Ends:
    """Where the iteration came to: y and z ``(B, n)`` float64, the updates of each sample ``(B,)``
    that count for a gradient (none where it ended NONFINITE), projections of each z_k, ``(updates,
    B, 4)``, the dtype of the map, and the method."""

    y: Tensor
    z: Tensor
    counts: Tensor
    shadows: Tensor
    dtype: torch.dtype
    method: Any


def _directions(z: Tensor) -> Tensor:
    """Signs ``(n, 4)``, the same for each call: ``|z|^2`` is the mean square of ``z @ signs``, for
    random ones."""
    numbers = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (z.shape[1], _PROJECTIONS), generator=numbers)
    return (2 * signs - 1).to(z)


def _rows(samples: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(samples.unsqueeze(1), a, b)


@torch.no_grad()
def solve(f: Map, start: Tensor, spec: SolveSpec, method: Any, first: Map) -> tuple[Solution, Ends]:
    """Iterates from ``start`` ``(B, n)`` until every sample has converged or made ``max_iter``
    updates; ``first`` makes the first evaluation. The value is the last z of each sample."""
    options, beta, dtype = spec.options, method.beta, start.dtype
    start = finite_rows(start.detach())
    y = z = start.double()
    batch = len(start)
    residual = torch.full((batch,), torch.inf, dtype=dtype, device=start.device)
    status = torch.full((batch,), Status.MAX_ITER, dtype=torch.int8, device=start.device)
    iterations = torch.zeros(batch, dtype=torch.int32, device=start.device)
    running = torch.ones(batch, dtype=torch.bool, device=start.device)
    evaluations, shadows, directions = 0, [], _directions(z)
    for k in range(options.max_iter + 1 if start.numel() else 0):
        at = z.to(dtype)
        value = first(at) if k == 0 else f(at)
        evaluations += 1
        seen = residual_of(
            value, at, options.tol, options.atol, spec.parts, False, options.stop_norm
        )
        finite = seen.norm.isfinite() & seen.relative.isfinite()
        residual = torch.where(running, torch.where(finite, seen.relative, torch.inf), residual)
        status = torch.where(running & ~finite, _NONFINITE, status)
        converged = running & (seen.relative <= seen.limit)
        if k < options.min_iter:
            converged = torch.zeros_like(converged)
        status = torch.where(converged, _CONVERGED, status)
        running = running & finite & ~converged
        if k == options.max_iter or not bool(running.any()):
            break
        next_y = (1 - beta) * y + beta * value
        value = f(_rows(running, next_y, y).to(dtype))
        evaluations += 1
        next_z = (1 - beta) * z + beta * value
        finite = (next_z + next_y).to(dtype).isfinite().all(1)
        failed = running & ~finite
        status = torch.where(failed, _NONFINITE, status)
        residual = torch.where(failed, torch.inf, residual)
        running = running & finite
        shadows.append(z @ directions)
        y, z = _rows(running, next_y, y), _rows(running, next_z, z)
        iterations = iterations + running
    solution = Solution(
        z.to(dtype),
        status,
        iterations,
        residual,
        solver=method,
        evaluations=evaluations,
        sample_evaluations=evaluations * batch,
        path="general",
    )
    counts = torch.where(solution.nonfinite, 0, iterations)
    none = z.new_zeros(0, batch, _PROJECTIONS)
    return solution, Ends(y, z, counts, torch.stack(shadows) if shadows else none, dtype, method)


def attach(f: Map, ends: Ends, spec: SolveSpec, report: Report) -> Tensor:
    """A copy of z with the gradient of the iteration for all that f closes over; ``spec`` is the
    adjoint's, whose tolerance the estimated error is to meet."""
    z = ends.z.to(ends.dtype)
    if z.numel() == 0:
        return f(z)
    theta = evaluate(f, z).theta
    if not theta:
        return z.clone()  # the solution has the memory of z
    how = spec, report, same_closure(f, theta), ends.method, ends.dtype
    attached: Tensor = ReversibleSteps.apply(
        *how, ends.y, ends.z, ends.counts, ends.shadows, *theta
    )
    return attached


class ReversibleSteps(Function):
    """z_n of ``Ends`` as a function of theta, the tensors that f closes over."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: SolveSpec,
        report: Report,
        f: Map,
        method: Any,
        dtype: torch.dtype,
        y: Tensor,
        z: Tensor,
        counts: Tensor,
        shadows: Tensor,
        *theta: Tensor,
    ) -> Tensor:
        ctx.spec, ctx.report, ctx.f, ctx.method, ctx.dtype = spec, report, f, method, dtype
        ctx.save_for_backward(y, z, counts, shadows, *theta)
        return z.to(dtype, copy=True)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, counts, shadows, *theta = ctx.saved_tensors
        ctx.report(None)
        beta, total = ctx.method.beta, _Total(theta)
        g, size = _norm(grad), _norm(z) + RESIDUAL_EPS
        error, left, directions = torch.zeros_like(g), counts, _directions(z)
        w, v = grad.double(), torch.zeros_like(z)
        for k in reversed(range(int(counts.max()))):
            active = (k < left).unsqueeze(1)
            value, back = total.pull(ctx.f, y.to(ctx.dtype), torch.where(active, beta * w, 0.0))
            v = v + back
            z = torch.where(active, (z - beta * value) / (1 - beta), z)
            off = (z @ directions - shadows[k]).square().mean(1).sqrt() / size
            lost = (off > _LOST) & active[:, 0]
            error = torch.where(
                active[:, 0], torch.maximum(error, torch.where(lost, 1.0, off) * _norm(w, v)), error
            )
            left = torch.where(lost, 0, left)
            active = active & ~lost.unsqueeze(1)
            value, back = total.pull(ctx.f, z.to(ctx.dtype), torch.where(active, beta * v, 0.0))
            w = torch.where(active, (1 - beta) * w + back, w)
            v = torch.where(active, (1 - beta) * v, v)
            y = torch.where(active, (y - beta * value) / (1 - beta), y)
        residual = torch.where(g > 0, error / g, error).to(ctx.dtype)
        ctx.report(_adjoint_solution(ctx.spec, ctx.method, w.to(ctx.dtype), counts, residual))
        sums = zip(total.sums, theta, strict=True)
        return (None,) * 9 + tuple(torch.zeros_like(t) if s is None else s for s, t in sums)


def _norm(*rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.cat([r.double() for r in rows], 1), dim=1)
    return norm


class _Total:
    """Gradients of theta, added up over evaluations of a map that closes over it."""

    def __init__(self, theta: list[Tensor]):
        self._theta = theta
        self.sums: list[Tensor | None] = [None] * len(theta)

    def pull(self, f: Map, rows: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """f of ``rows`` and ``J^T cotangent``, ``(B, n)`` float64."""
        at = placed_above(rows, self._theta)
        with torch.enable_grad():
            value = f(at)
        found: tuple[Tensor | None, ...] = (None,)
        if value.requires_grad:
            with cut_above([at, *self._theta]):
                found = torch.autograd.grad(
                    value, [at, *self._theta], cotangent.to(value.dtype), allow_unused=True
                )
            for i, more in enumerate(found[1:]):
                before = self.sums[i]
                self.sums[i] = before if more is None else more if before is None else before + more
        back = torch.zeros_like(rows) if found[0] is None else found[0]
        return value.detach().double(), back.double()


def _adjoint_solution(
    spec: SolveSpec, method: Any, value: Tensor, counts: Tensor, residual: Tensor
) -> Solution:
    met = residual <= spec.options.tol
    status = torch.where(met, _CONVERGED, int(Status.STAGNATED)).to(torch.int8)
    made = 2 * int(counts.max())
    return Solution(
        value,
        status,
        counts.to(torch.int32),
        residual,
        solver=method,
        evaluations=made,
        sample_evaluations=made * len(counts),
        path="general",
    )
