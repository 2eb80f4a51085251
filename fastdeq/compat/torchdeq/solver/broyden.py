"""Broyden's method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ....solvers import Broyden
from .engine import Result, engine_solve, refuse_unknown


def broyden_solver(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    LBFGS_thres: int | None = None,  # noqa: N803
    ls: bool = False,
    return_final: bool = False,
    **kwargs: Any,
) -> Result:
    """Broyden's "good" method, each sample on its own, by :class:`fastdeq.Broyden`.

    Args:
        func, x0, max_iter, tol, stop_mode, indexing: see ``engine.solve``; one evaluation more.
        LBFGS_thres: pairs of vectors that are kept; None: all.
        ls: not needed: a step that makes a residual much worse is taken back.
        return_final: make all steps, and return the last state rather than the best.
        kwargs: options of other solvers, which are not needed here.
    """
    refuse_unknown("broyden_solver", kwargs)
    updates = max(int(max_iter), 0)
    return engine_solve(
        Broyden(memory=LBFGS_thres or max(updates, 1)),
        func,
        x0,
        max_iter=updates + 1 if updates else 0,
        tol=tol,
        stop_mode=stop_mode,
        indexing=indexing,
        columns=updates + 1,
        before=1,
        traced_from=1,
        final=return_final,
    )
