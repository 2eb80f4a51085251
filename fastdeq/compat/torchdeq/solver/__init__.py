"""Solvers by name: torchdeq's, those of ``fastdeq.solvers``, and those that are registered.

A solver is a function ``solver(func, x0, max_iter=..., tol=..., stop_mode=..., indexing=...)`` that
returns the state, states after the steps in ``indexing``, and the statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ....errors import check_choice
from ....solvers import ADJOINT, FORWARD, Anderson, Broyden, Neumann
from .anderson import anderson_solver
from .broyden import broyden_solver
from .engine import Result, engine_solve, refuse_unknown
from .fp_iter import fixed_point_iter, simple_fixed_point_iter
from .stat import SolverStat
from .utils import solver_stat_from_final_step

_solvers: dict[str, Callable[..., Any]] = {
    "anderson": anderson_solver,
    "broyden": broyden_solver,
    "fixed_point_iter": fixed_point_iter,
    "simple_fixed_point_iter": simple_fixed_point_iter,
}
#: For which a cell would have to be known to be symmetric.
_NOT_HERE = ("energy", "minres")


def _native(
    name: str,
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    return_final: bool = False,
    **kwargs: Any,
) -> Result:
    """A solver of this package by its name there."""
    refuse_unknown(name, kwargs)
    return engine_solve(
        name,
        func,
        x0,
        max_iter=max_iter,
        tol=tol,
        stop_mode=stop_mode,
        indexing=indexing,
        columns=max(int(max_iter), 0) + 1,
        final=return_final,
    )


for _name in ("auto", *dict.fromkeys((*FORWARD, *ADJOINT))):
    if _name not in _NOT_HERE:
        _solvers.setdefault(_name, functools.partial(_native, _name))


def get_solver(key: str) -> Callable[..., Any]:
    """The solver of that name.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    check_choice(key, _solvers, "solver")
    return _solvers[key]


def register_solver(solver_type: str, solver: Callable[..., Any]) -> None:
    """Makes ``solver``, a function as this module describes it, known as ``solver_type``."""
    if not callable(solver):
        raise TypeError(f"a solver must be callable, not {solver!r}.")
    _solvers[solver_type] = solver


def mixes_steps(solver: Callable[..., Any]) -> bool:
    """Whether a solver of here makes steps out of several, which go wrong for single samples of a
    batch whose samples depend on each other."""
    plain = (fixed_point_iter, simple_fixed_point_iter)
    return solver not in plain and adjoint_solver(solver, 1) is not None


def adjoint_solver(solver: Callable[..., Any], max_iter: int) -> Any:
    """What solves the linear system of an implicit gradient in ``fastdeq`` for a solver of here;
    None for one that was registered."""
    if solver is fixed_point_iter:
        return Neumann()
    if solver is simple_fixed_point_iter:
        return Neumann(fixed_iterations=max_iter)
    if solver is anderson_solver:
        return Anderson()
    if solver is broyden_solver:
        return Broyden(memory=max_iter)
    if isinstance(solver, functools.partial) and solver.func is _native:
        return solver.args[0]
    return None


__all__ = [
    "SolverStat",
    "anderson_solver",
    "broyden_solver",
    "fixed_point_iter",
    "get_solver",
    "register_solver",
    "simple_fixed_point_iter",
    "solver_stat_from_final_step",
]
