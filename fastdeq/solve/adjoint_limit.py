"""Limits the adjoint of samples next to a singular ``I - J``.

Per sample, ``u = g + J^T u`` is scaled down to ``|u| <= limit |g|``, 2-norms: its direction stays,
which is that of the nearly singular vector. So is the best iterate of a sample that did not
converge. In second derivatives whatever goes back through the layer is limited in the same way, and
the scale is differentiated; the solve for what u itself depends on is not limited. Solvers know
nothing of it, and nothing runs where there is no limit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from ..solution import Solution
from .spec import Report, SolveSpec


def limits_adjoint(solve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorates ``solve(spec, report, fz, at, grad, ...)``, which returns u ``(B, n)`` for the
    gradients ``grad``, so that it heeds the limit of a spec."""

    @functools.wraps(solve)
    def with_limit(
        spec: SolveSpec,
        report: Report,
        fz: Tensor,
        at: Tensor,
        grad: Tensor,
        *others: Any,
        **named: Any,
    ) -> Tensor:
        if spec.limit is None:
            return solve(spec, report, fz, at, grad, *others, **named)
        found = Held(report)
        u = solve(replace(spec, limit=None), found, fz, at, grad, *others, **named)
        return limited(found, u, grad, spec.limit)

    return with_limit


def limited(found: Held, u: Tensor, grad: Tensor, limit: float) -> Tensor:
    """u ``(B, n)`` of the solution ``found``, limited next to ``grad``."""
    scale = _scale(u, grad, limit)
    u = u * scale
    found.pass_on(u, scale)
    return u


def limited_affine(
    spec: SolveSpec,
    report: Report,
    solve: Callable[[SolveSpec, Report], Tensor],
    weight: Tensor,
    grad: Tensor,
) -> Tensor:
    """``q = D u`` of ``solve``, limited in ``u = g + q W``, W ``(d, d)`` and g ``(B, d)``."""
    assert spec.limit is not None
    found = Held(report)
    q = solve(replace(spec, limit=None), found)
    scale = _scale(grad + q @ weight, grad, spec.limit)
    q = q * scale
    found.pass_on(q, scale)
    return q


def _scale(u: Tensor, grad: Tensor, limit: float) -> Tensor:
    """What each u is to be multiplied by, ``(B, 1)``; 1 for NaN."""
    norm, most = (
        torch.linalg.vector_norm(t, dim=1, keepdim=True, dtype=torch.float64) for t in (u, grad)
    )
    most = limit * most
    over = norm > most
    # Both divisions are made of numbers that are not zero, for the sake of second derivatives.
    scale = torch.where(over, most / torch.where(over, norm, 1.0), 1.0)
    return scale.to(u.dtype)


class Held:
    """Keeps a solution back until it is known which samples were limited."""

    def __init__(self, report: Report):
        self._report = report
        self._solution: Solution | None = None

    def __call__(self, solution: Solution | None) -> None:
        if solution is None:
            self._report(None)
        self._solution = solution

    def pass_on(self, value: Tensor, scale: Tensor) -> None:
        """Reports it, unless there was none, as in a traced backward pass."""
        if self._solution is None:
            return
        if is_functorch_wrapped_tensor(scale):  # a batch of problems, solved as one
            self._report(self._solution)
            return
        found = (value.detach(), scale.detach()[:, 0] < 1)
        self._report(replace(self._solution, value=found[0], limited=found[1]))
