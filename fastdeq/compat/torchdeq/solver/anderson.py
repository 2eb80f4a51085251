"""Anderson acceleration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ....solvers import Anderson
from .engine import Result, engine_solve, refuse_unknown


def anderson_solver(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    m: int = 6,
    lam: float | None = None,
    tau: float = 1.0,
    return_final: bool = False,
    **kwargs: Any,
) -> Result:
    """Anderson acceleration, each sample on its own, by :class:`fastdeq.Anderson`: no solve is
    singular, and a step that makes a residual worse is taken back.

    Args:
        func, x0, max_iter, tol, stop_mode, indexing: see ``engine.solve``.
        m: states in the history, 2 or more.
        lam: ridge, relative to the history; None: that of :class:`fastdeq.Anderson`.
        tau: damping in (0, 1].
        return_final: make all steps, and return the last state rather than the best.
        kwargs: options of other solvers, which are not needed here.
    """
    refuse_unknown("anderson_solver", kwargs)
    options: dict[str, Any] = {} if lam is None else {"regularization": float(lam)}
    return engine_solve(
        Anderson(window=max(m - 1, 1), damping=float(tau), **options),
        func,
        x0,
        max_iter=max_iter,
        tol=tol,
        stop_mode=stop_mode,
        indexing=indexing,
        columns=max(int(max_iter) - 1, 1),
        traced_from=2,
        final=return_final,
    )
