"""``fixed_point``: the solve of a function that closes over anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .backends.choose import Backend
from .errors import lists_options
from .failure import OnFailure, handle_failure
from .gradients import Gradient, GradientMethod
from .options import (
    AdjointName,
    BatchDim,
    Options,
    Precision,
    Randomness,
    SolverName,
    State,
    StopNorm,
)
from .solution import Solution
from .solve.cell_map import CellMap
from .solve.checked_maps import modules_of, with_the_code_of
from .solve.eager import outside_graphs
from .solve.general import solve_map
from .solve.record import OnSolution, check_watching
from .solve.sharding import refuse_sharded
from .solve.spec import Specs
from .solvers import Solver, Structure

#: What the function returns: a state, or that and something else.
Value = TypeVar("Value")


@outside_graphs
@lists_options("fixed_point")
def fixed_point(
    f: Callable[[State], Value],
    z0: State,
    *,
    solver: SolverName | Solver = "auto",
    adjoint: AdjointName | Solver = "auto",
    gradient: Gradient | GradientMethod = "implicit",
    adjoint_limit: float | None = None,
    batch_dim: BatchDim = 0,
    has_aux: bool = False,
    randomness: Randomness = "different",
    tol: float = 1e-4,
    adjoint_tol: float | None = None,
    atol: float = 0.0,
    adjoint_atol: float = 0.0,
    stop_norm: StopNorm = "2",
    min_iter: int = 0,
    max_iter: int = 100,
    adjoint_max_iter: int | None = None,
    patience: int | None = None,
    precision: Precision = "auto",
    backend: Backend = "auto",
    on_failure: OnFailure = "warn",
    on_solution: OnSolution | None = None,
) -> tuple[Value, Solution]:
    """Solves ``z = f(z)`` for each sample, differentiable in everything that f closes over.

    Args:
        f: maps a state to a state of the same structure and shapes and treats samples
            independently; with ``has_aux`` it returns ``(state, aux)``.
        z0: start, a floating-point or complex tensor or any structure of them (tuples, lists,
            dicts, named tuples); it gets no gradient. A tensor without dimensions is one sample.
        batch_dim: which dimension of the state counts samples: 0, another, a tuple of several, or
            None where all of the state is one sample, as a vector ``(n,)`` is.

    The keyword arguments are those of :class:`fastdeq.DEQLayer`. That samples are independent is
    looked at in the first call in grad mode with two of them or more, for each code of f, the
    modules that it names (and which of them are in training mode), ``batch_dim`` and numbers of
    dimensions of the state: a lambda made anew for each x is looked at once. Other things that a
    function with the same code closes over are not told apart.

    Returns:
        What f returns, at the solution, and its :class:`fastdeq.Solution`: the state, or
        ``(state, aux)`` with ``has_aux``.

    Raises:
        TypeError, ValueError: options or states that do not fit; the message lists what does.
        CoupledSamplesError: a sample depends on another; a ValueError.
        ConvergenceError: with ``on_failure="raise"``, also from the backward pass.
    """
    options = Options(
        solver=solver,
        adjoint=adjoint,
        gradient=gradient,
        adjoint_limit=adjoint_limit,
        batch_dim=batch_dim,
        has_aux=has_aux,
        randomness=randomness,
        tol=tol,
        adjoint_tol=adjoint_tol,
        atol=atol,
        adjoint_atol=adjoint_atol,
        stop_norm=stop_norm,
        min_iter=min_iter,
        max_iter=max_iter,
        adjoint_max_iter=adjoint_max_iter,
        patience=patience,
        precision=precision,
        backend=backend,
        on_failure=on_failure,
    )

    def report(solution: Solution | None) -> None:
        if solution is not None:
            if on_solution is not None:
                on_solution("adjoint", solution)
            handle_failure(solution, on_failure, "adjoint solve")

    check_watching(0, on_solution)
    specs = Specs(options, Structure())
    refuse_sharded(modules_of(f))
    whole = CellMap.of_call(f, z0, options)
    z, solution = solve_map(whole, z0, specs, report, with_the_code_of(f), f)
    if on_solution is not None:
        on_solution("forward", solution)
    handle_failure(solution, on_failure, "fixed_point")
    value: Any = (z, whole.auxiliary(z)) if has_aux else z
    return value, solution
