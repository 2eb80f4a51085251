"""``fixed_point``: the functional form, and the two paths (affine cell, general map) behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import driver, engines, functions, ops
from .activations import ACTIVATIONS
from .options import Options
from .plans import AdjointPlan, AffinePlan
from .solution import Solution, handle_failure
from .solvers import Solver, Structure, choose
from .state import Packing

Report = Callable[[Solution], None]


def fixed_point(
    f: Callable[[Any], Any],
    z0: Any,
    *,
    solver: str | Solver = "auto",
    adjoint: str | Solver = "auto",
    gradient: str = "implicit",
    tol: float = 1e-4,
    adjoint_tol: float | None = None,
    max_iter: int = 100,
    adjoint_max_iter: int | None = None,
    precision: str = "auto",
    backend: str = "auto",
    on_failure: str = "warn",
    **unknown: object,
) -> tuple[Any, Solution]:
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
    options = Options.checked(
        "fixed_point",
        unknown,
        solver=solver,
        adjoint=adjoint,
        gradient=gradient,
        tol=tol,
        adjoint_tol=adjoint_tol,
        max_iter=max_iter,
        adjoint_max_iter=adjoint_max_iter,
        precision=precision,
        backend=backend,
        on_failure=on_failure,
    )

    def report(solution: Solution) -> None:
        handle_failure(solution, on_failure, "adjoint solve")

    z, solution = solve_map(f, z0, options, Structure(), report)
    handle_failure(solution, on_failure, "fixed_point")
    return z, solution


def solve_map(
    f: Callable[[Any], Any], z0: Any, options: Options, structure: Structure, report: Report
) -> tuple[Any, Solution]:
    """The general path: f on states ``z0``-like. ``report`` receives the adjoint's solution."""
    if options.precision == "mixed":
        raise ops.BackendError(
            "precision='mixed' is not available: only the solve of an AffineCell has it, without "
            "hooks, further arguments and solvers of one's own. Use precision='auto'."
        )
    packing = Packing(z0)
    rows = packing.rowwise(f)
    anderson_mix = ops.implementation(options.backend, packing.device)
    with torch.no_grad():
        start = driver.finite_rows(packing.pack(z0))
    # The first evaluation is made under autograd: what the cell caches then (as in
    # torch.nn.utils.parametrize.cached) keeps its graph for the evaluation that is differentiated.
    start_value = rows(start).detach() if torch.is_grad_enabled() and len(start) else None
    with torch.no_grad():
        solution = driver.solve(
            rows,
            start,
            choose(options.solver, structure, options.tol, adjoint=False),
            tol=options.tol,
            max_iter=options.max_iter,
            anderson_mix=anderson_mix,
            start_value=start_value,
        )
    z = solution.value
    if torch.is_grad_enabled():
        failed = solution.nonfinite.unsqueeze(1)
        if options.gradient == "implicit":
            plan = adjoint_plan(options, structure, z.device, report)
            attached = functions.attach(plan, functions.rerun_autocast(rows, z.device.type), z)
        else:
            attached = functions.one_step(rows, z)
        z = torch.where(failed, z, attached)
    value = packing.unpack(solution.value)
    return packing.unpack(z), replace(solution, value=value, contraction=structure.contraction)


def solve_affine(
    weight: Tensor,
    injection: Tensor,
    start: Tensor | None,
    activation: str,
    options: Options,
    structure: Structure,
    report: Report,
) -> tuple[Tensor, Solution]:
    """The fused path: ``z = phi(z W^T + c)``, weight ``(d, d)``, injection and start ``(B, d)``.

    Without a start it starts from zeros.
    """
    solver = choose(options.solver, structure, options.tol, adjoint=False)
    plan = AffinePlan(
        activation,
        solver,
        options.tol,
        options.max_iter,
        options.precision,
        options.backend,
        structure.exact,
    )
    wanted = torch.is_grad_enabled() and (weight.requires_grad or injection.requires_grad)
    engines.check_precision(options.precision, options.backend, weight, solver)
    if wanted and options.gradient == "implicit":
        adjoint = adjoint_plan(options, structure, injection.device, report)
        engines.check_precision(options.precision, options.backend, weight, adjoint.solver)
        for what, chosen, limit in (
            ("solve", solver, options.max_iter),
            ("adjoint solve", adjoint.solver, adjoint.max_iter),
        ):
            engines.check_backend(
                *(what, options.backend, chosen, limit, options.precision, structure.exact),
                *(injection, weight),
            )
        outputs = functions.AffineFixedPoint.apply(plan, adjoint, weight, injection, start)
    else:
        outputs = plan.solve(weight.detach(), injection.detach(), start, slope=False)
    z, status, iterations, residual, rejects, *_ = outputs
    counters = dict(zip(solver.rejects, rejects.unbind(1), strict=True))
    contraction = structure.contraction
    solution = Solution(z.detach(), status, iterations, residual, counters, contraction)
    if wanted and options.gradient == "one_step":
        phi = ACTIVATIONS[activation].function
        failed = solution.nonfinite.unsqueeze(1)
        attached = functions.one_step(lambda r: phi(torch.addmm(injection, r, weight.t())), z)
        z = torch.where(failed, z, attached)
    return z, solution


def adjoint_plan(
    options: Options, structure: Structure, device: torch.device, report: Report
) -> AdjointPlan:
    tol, max_iter = options.adjoint_limits()
    return AdjointPlan(
        choose(options.adjoint, structure, tol, adjoint=True),
        tol,
        max_iter,
        options.precision,
        options.backend,
        ops.implementation(options.backend, device),
        structure.exact,
        report,
    )
