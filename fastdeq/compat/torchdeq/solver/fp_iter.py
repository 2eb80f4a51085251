"""Plain and damped fixed-point iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .engine import Result, refuse_unknown, solve
from .stat import SolverStat
from .watch import Watch


def fixed_point_iter(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    tau: float = 1.0,
    return_final: bool = False,
    **kwargs: Any,
) -> Result:
    """``z <- (1 - tau) z + tau f(z)``, until all samples have converged.

    Args:
        func, x0, max_iter, tol, stop_mode, indexing: see ``engine.solve``. Residuals are those of f
            itself, whatever ``tau``.
        tau: damping.
        return_final: make all steps, and return the last state rather than the best.
        kwargs: options of other solvers, which are not needed here.
    """
    refuse_unknown("fixed_point_iter", kwargs)
    damped = func if tau == 1.0 else lambda z: z + tau * (func(z) - z)

    def run(watch: Watch, start: Tensor, evaluations: int) -> None:
        point = start
        for _ in range(evaluations):
            point = watch(point)

    return solve(
        damped,
        x0,
        run,
        max_iter=max_iter,
        tol=tol,
        stop_mode=stop_mode,
        indexing=indexing,
        columns=max(int(max_iter), 0) + 1,
        final=return_final,
        damping=tau,
    )


@torch.no_grad()
def simple_fixed_point_iter(
    func: Callable[..., Tensor],
    x0: Tensor,
    max_iter: int = 50,
    tau: float = 1.0,
    indexing: Sequence[int] | None = None,
    **kwargs: Any,
) -> Result:
    """``max_iter`` steps of ``fixed_point_iter``; nothing is looked at but the last of them.

    ``tol`` and ``stop_mode`` among the other arguments are not needed.
    """
    refuse_unknown("simple_fixed_point_iter", _without(kwargs, "tol", "stop_mode"))
    before = point = x0.detach()
    kept = {}
    for step in range(1, int(max_iter) + 1):
        before, value = point, func(point)
        point = value if tau == 1.0 else before + tau * (value - before)
        if indexing and step in indexing:
            kept[step] = point
    states = [kept.get(step, point) for step in indexing or ()]
    return point, states, SolverStat.from_final_step(before, point, int(max_iter))


def _without(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}
