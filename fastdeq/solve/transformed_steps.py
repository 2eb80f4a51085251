"""Gradients through steps under transforms: all samples take as many as the slowest.

Transforms follow the operations of the steps themselves, so these are the plain ones of
``tracked_steps``; how many samples there are, and which have stopped, only the innermost solve
knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..gradients import Phantom, Reversible, Truncated
from ..solution import Solution


def attach(
    gradient: Any,
    f: Callable[[Tensor], Tensor],
    start: Tensor,
    z: Tensor,
    failed: Tensor,
    solution: Solution,
) -> Tensor:
    """The end of the steps that ``gradient`` differentiates, rows ``(B, n)``, from ``start`` and
    z, where the solve ended; samples that ``failed`` ``(B, 1)`` stay where they are.

    Raises:
        ValueError: a reversible gradient, which runs its steps backwards.
    """
    if isinstance(gradient, Reversible):
        raise ValueError(
            f"gradient={gradient!r} has no derivatives under torch.func or in forward mode: pass "
            'gradient="unrolled", which has the gradient of every step, or "implicit".'
        )
    z = z.detach()
    if gradient == "one_step":
        value = f(z)
        return value + (z - value).detach()
    if isinstance(gradient, Phantom):
        return _steps(f, z, failed, gradient.steps, gradient.damping)
    made, damping = int(solution.iterations.max()), solution.solver.damping
    tracked = min(gradient.steps, made) if isinstance(gradient, Truncated) else made
    z = torch.where(failed, z, start.detach())
    for _ in range(made - tracked):
        z = _steps(f, z, failed, 1, damping).detach()
    return _steps(f, z, failed, tracked, damping)


def _steps(
    f: Callable[[Tensor], Tensor], z: Tensor, failed: Tensor, count: int, damping: float
) -> Tensor:
    for _ in range(count):
        value = f(z)
        following = value if damping == 1.0 else z + damping * (value - z)
        z = torch.where(failed, z, following)
    return z
