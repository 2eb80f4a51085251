"""Gradients through plain steps that autograd records: phantom, truncated and unrolled.

``z_(k+1) = z_k + damping (f(z_k) - z_k)``. A solve without autograd has found each sample's count
of updates n, and these steps are made again: sample i makes its own number of them, and is frozen
from then on. So samples that ended NONFINITE make none, and cannot reach the others.

- phantom:    k steps from the state that was found;
- truncated:  n - k steps without autograd, then k (or n, if that is less) with it;
- unrolled:   n steps from the start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..gradients import Phantom, Truncated, Unrolled
from ..solution import Solution, may_look
from ..solvers.loop import finite_rows
from .unmoved import attach_unmoved

Map = Callable[[Tensor], Tensor]


def attach(method: Any, f: Map, start: Tensor, solution: Solution) -> Tensor:
    """The end of the steps that ``method`` differentiates, rows ``(B, n)``, from ``start``
    ``(B, n)`` and the solution of ``z = f(z)`` that was found from there."""
    z = solution.value.detach()
    if len(z) == 0:
        return f(z)
    stopped = solution.nonfinite
    if isinstance(method, Phantom):
        counts = torch.where(stopped, 0, method.steps)
        # Nothing waits for a device to know whether all samples go on.
        least = method.steps if stopped.device.type == "cpu" and _none(stopped) else 0
        return steps(f, z, counts, method.damping, (least, method.steps))
    counts = torch.where(stopped, 0, solution.iterations)
    damping = solution.solver.damping
    z = finite_rows(start.detach())
    tracked = counts
    if isinstance(method, Truncated):
        before = (counts - method.steps).clamp(min=0)
        with torch.no_grad():
            z = steps(f, z, before, damping).detach()
        tracked = counts - before
    if not bool(tracked.any()):
        return attach_unmoved(f, z)
    keeps = not isinstance(method, Unrolled) or not method.checkpoint
    return steps(f, z, tracked, damping, run=None if keeps else _checkpointed)


def steps(
    f: Map,
    z: Tensor,
    counts: Tensor,
    damping: float,
    bounds: tuple[int, int] | None = None,
    run: Callable[[Map, Tensor], Tensor] | None = None,
) -> Tensor:
    """``counts`` ``(B,)`` steps of each sample from z ``(B, n)``, all of them between ``bounds``;
    None: these are looked at. ``run`` evaluates a step."""

    def step(z: Tensor) -> Tensor:
        value = f(z)
        return value if damping == 1.0 else z + damping * (value - z)

    least, most = bounds or (int(n) for n in counts.aminmax())
    for k in range(most):
        following = step(z) if run is None else run(step, z)
        z = following if k < least else torch.where((k < counts).unsqueeze(1), following, z)
    return z


def _checkpointed(step: Map, z: Tensor) -> Tensor:
    z_after: Any = checkpoint(step, z, use_reentrant=False)
    return z_after  # type: ignore[no-any-return]


def _none(samples: Tensor) -> bool:
    return may_look(samples) and not bool(samples.any())
