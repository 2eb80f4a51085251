"""Gradients through steps under transforms: all samples take as many as the slowest.

Transforms follow the operations of the steps themselves, so these are the plain ones of
``tracked_steps``; how many samples there are, and which have stopped, only the innermost solve
knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..gradients import Phantom, Reversible, Truncated
from ..solution import Solution


def attach(
    gradient: Any, f: Callable[[Tensor], Tensor], start: Tensor, z: Tensor, solution: Solution
) -> Tensor:
    """The end of the steps that ``gradient`` differentiates, rows ``(B, n)``, from ``start`` and
    z, where the solve ended.

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
        return _steps(f, z, gradient.steps, gradient.damping)
    made, damping = int(solution.iterations.max()), solution.solver.damping
    tracked = min(gradient.steps, made) if isinstance(gradient, Truncated) else made
    z = start.detach()
    for _ in range(made - tracked):
        z = _steps(f, z, 1, damping).detach()
    return _steps(f, z, tracked, damping)


def _steps(f: Callable[[Tensor], Tensor], z: Tensor, count: int, damping: float) -> Tensor:
    for _ in range(count):
        value = f(z)
        z = value if damping == 1.0 else z + damping * (value - z)
    return z
