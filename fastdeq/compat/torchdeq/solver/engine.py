"""Solves of torchdeq's kind by this package's solvers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ....errors import check_choice, check_options
from ....options import Options
from ....solve.packing import ArgumentWrittenError, Packing
from ....solve.spec import SolveSpec, Specs
from ....solvers import Structure
from .stat import SolverStat
from .watch import FinishedError, Watch

#: What a solver returns: the state, states after given steps, and the statistics.
Result = tuple[Tensor, list[Tensor], SolverStat]
#: Runs a solve of a watched map of rows from a start, by so many evaluations at most.
Run = Callable[[Watch, Tensor, int], None]

STOP_MODES = ("abs", "rel")
#: Options of some solver, which the others take and do not need: who exchanges one solver for
#: another need not change the rest.
OPTIONAL = ("m", "lam", "tau", "return_final", "LBFGS_thres", "ls")
_COMMON = ("func", "x0", "max_iter", "tol", "stop_mode", "indexing")


def refuse_unknown(owner: str, given: dict[str, Any]) -> None:
    """Raises TypeError for options that no solver has."""
    unknown = {name: value for name, value in given.items() if name not in OPTIONAL}
    check_options(unknown, (*_COMMON, *OPTIONAL), owner)


@torch.no_grad()
def solve(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    run: Run,
    *,
    max_iter: float,
    tol: float,
    stop_mode: str,
    indexing: Sequence[int] | None,
    columns: int,
    copies: Callable[[Tensor], bool] = lambda rows: rows.is_inference(),
    **watching: Any,
) -> Result:
    """The best state of each sample of ``x0`` ``(B, ...)`` that ``run`` comes through; without a
    graph. Samples that are known to be coupled are one row.

    Args:
        func: maps a state to one of the same shape.
        x0: the start; a vector is B samples of one number.
        max_iter: most evaluations.
        tol, stop_mode: converged is ``|f(z) - z| < tol``, divided by ``|f(z)|`` with "rel", 2-norms
            of each sample; the solve goes on until all samples are.
        indexing: steps after which states are returned too.
        columns: of the traces.
        copies: whether the map may not see the memory of rows.
        watching: further arguments of ``Watch``.
    """
    check_choice(stop_mode, STOP_MODES, "stop_mode")
    coupled = getattr(func, "coupled", False)
    packing = Packing(x0, None if coupled else 0)
    start = packing.pack(x0.detach(), "x0")
    samples = len(x0) if coupled and x0.dim() else len(start)
    packing.copies = copies(start)

    def once() -> Watch:
        watch = Watch(packing.rowwise(func), start, samples, tol, stop_mode, indexing, **watching)
        if max_iter >= 1:
            with contextlib.suppress(FinishedError):
                run(watch, start, int(max_iter))
        return watch

    try:
        watch = once()
    except ArgumentWrittenError:
        packing.copies = True
        watch = once()
    states = [_unshared(packing.unpack(rows), x0) for rows in (watch.best, *watch.states())]
    return states[0], states[1:], watch.stat(columns)


def _unshared(state: Tensor, x0: Tensor) -> Tensor:
    return state.clone() if state.data_ptr() == x0.data_ptr() else state


@functools.lru_cache(maxsize=256)
def _spec(solver: Any, updates: int) -> SolveSpec:
    options = Options(solver=solver, tol=0.0, max_iter=updates)
    return Specs(options, Structure()).forward


def engine_solve(
    solver: Any,
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    max_iter: float,
    **how: Any,
) -> Result:
    """``solve`` by a solver of ``fastdeq.solvers``, or its name."""
    spec = _spec(solver, max(int(max_iter) - 1, 1))

    def run(watch: Watch, start: Tensor, evaluations: int) -> None:
        if evaluations == 1:
            watch(start)
        else:
            spec.iterate(watch, start)

    # Only the compiled iteration leaves a point alone that somebody keeps.
    def copies(rows: Tensor) -> bool:
        return rows.is_inference() or not spec.is_compiled(rows)

    return solve(func, x0, run, max_iter=max_iter, copies=copies, **how)
