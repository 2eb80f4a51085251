"""``fixed_point``: the solve of a function that closes over anything."""

from __future__ import annotations

from collections.abc import Callable

from .backends.choose import Backend
from .errors import lists_options
from .options import AdjointName, Gradient, Options, Precision, SolverName, State
from .solution import OnFailure, Solution, handle_failure
from .solve.eager import outside_graphs
from .solve.general import solve_map
from .solve.spec import Specs
from .solvers import Solver, Structure


@outside_graphs
@lists_options("fixed_point")
def fixed_point(
    f: Callable[[State], State],
    z0: State,
    *,
    solver: SolverName | Solver = "auto",
    adjoint: AdjointName | Solver = "auto",
    gradient: Gradient = "implicit",
    tol: float = 1e-4,
    adjoint_tol: float | None = None,
    atol: float = 0.0,
    adjoint_atol: float = 0.0,
    max_iter: int = 100,
    adjoint_max_iter: int | None = None,
    patience: int | None = None,
    precision: Precision = "auto",
    backend: Backend = "auto",
    on_failure: OnFailure = "warn",
) -> tuple[State, Solution]:
    """Solves ``z = f(z)`` for each sample, differentiable in everything that f closes over.

    Args:
        f: maps a state to a state of the same shapes and treats samples (rows of the first
            dimension) independently.
        z0: start, a floating-point tensor ``(B, ...)`` or a tuple of them; it gets no gradient.

    The keyword arguments are those of :class:`fastdeq.DEQLayer`.

    Returns:
        The state, shaped like z0, and its :class:`fastdeq.Solution`.

    Raises:
        TypeError, ValueError: options or states that do not fit; the message lists what does.
        ConvergenceError: with ``on_failure="raise"``, also from the backward pass.
    """
    options = Options(
        solver=solver,
        adjoint=adjoint,
        gradient=gradient,
        tol=tol,
        adjoint_tol=adjoint_tol,
        atol=atol,
        adjoint_atol=adjoint_atol,
        max_iter=max_iter,
        adjoint_max_iter=adjoint_max_iter,
        patience=patience,
        precision=precision,
        backend=backend,
        on_failure=on_failure,
    )

    def report(solution: Solution) -> None:
        handle_failure(solution, on_failure, "adjoint solve")

    z, solution = solve_map(f, z0, Specs(options, Structure()), report)
    handle_failure(solution, on_failure, "fixed_point")
    return z, solution
