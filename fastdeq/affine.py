"""The whole solve of an affine cell as one operator, in plain PyTorch.

Forward  ``z = phi(W z + c)``;  adjoint  ``q = D (g + q W)`` with ``D = phi'(W z* + c)``. Both are
the driver's loop around one product with W; input narrower than float32 is solved in float32. Every
device has this form, and it is what a faster one is tested against.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import driver, ops, reference
from .solution import Solution
from .solvers import SOLVERS, Solver

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def encode(solver: Solver) -> tuple[str, list[float]]:
    """A registered solver as an operator's arguments: its name and its options in order."""
    fields = dataclasses.fields(solver)  # type: ignore[arg-type]
    return solver.name, [float(getattr(solver, f.name)) for f in fields]


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype a solve runs in: float64 where any input has it, otherwise float32."""
    wide = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def unit_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit norm and their lengths ``(B, 1)``; a row of zeros keeps length 1.

    A linear solve is homogeneous, its stop test is not: next to ``driver.RESIDUAL_EPS`` a small
    gradient (the mean over a large batch, say) would pass for a solved one.
    """
    # Twice: squares of entries below 1e-19 vanish in float32, and of entries above overflow.
    largest = grad.abs().amax(1, keepdim=True) if grad.shape[1] else grad.new_ones(len(grad), 1)
    scaled = grad / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    length = torch.where(largest > 0, largest * norm, 1.0)
    return scaled / torch.where(norm > 0, norm, 1.0), length


def solve_affine(
    weight: Tensor,
    injection: Tensor,
    start: Tensor,
    activation: str,
    solver: str,
    solver_options: Sequence[float],
    tol: float,
    max_iter: int,
    *,
    anderson_mix: Callable[..., Any] | None = None,
) -> Outputs:
    """Solves ``z = phi(z W^T + c)``: weight ``(d, d)``, injection and start ``(B, d)``."""
    dtype = working_dtype(weight, injection, start)
    w, c = weight.to(dtype), injection.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        solution = driver.solve(
            lambda z: reference.affine_step(w, c, z, activation),
            start.to(dtype),
            SOLVERS[solver](*solver_options),
            tol=tol,
            max_iter=max_iter,
            anderson_mix=anderson_mix or torch.ops.fastdeq.anderson_mix,
        )
    return _outputs(solution, injection.dtype)


def solve_affine_adjoint(
    weight: Tensor,
    slope: Tensor,
    grad: Tensor,
    solver: str,
    solver_options: Sequence[float],
    tol: float,
    max_iter: int,
    *,
    anderson_mix: Callable[..., Any] | None = None,
) -> Outputs:
    """Solves ``q = D (g + q W)``: weight ``(d, d)``, slope D and grad g ``(B, d)``."""
    dtype = working_dtype(weight, slope, grad)
    w, d = weight.to(dtype), slope.to(dtype)
    g, length = unit_rows(grad.to(dtype))
    with torch.autocast(weight.device.type, enabled=False):
        solution = driver.solve(
            lambda q: reference.affine_adjoint_step(w, d, g, q),
            torch.zeros_like(g),
            SOLVERS[solver](*solver_options),
            tol=tol,
            max_iter=max_iter,
            anderson_mix=anderson_mix or torch.ops.fastdeq.anderson_mix,
            start_value=d * g,
        )
    return _outputs(solution.with_value(solution.value * length), grad.dtype)


_BODIES: dict[str, Callable[..., Outputs]] = {
    "solve_affine": solve_affine,
    "solve_affine_adjoint": solve_affine_adjoint,
}
for _name, _body in _BODIES.items():
    torch.library.impl(f"fastdeq::{_name}", "CompositeExplicitAutograd")(_body)


def _outputs(solution: Solution, dtype: torch.dtype) -> Outputs:
    counters = list(solution.rejects.values())
    rejects = (
        torch.stack(counters, 1)
        if counters
        else solution.iterations.new_empty(len(solution.iterations), 0)
    )
    # An operator's outputs must not alias its inputs or each other.
    value = solution.value.to(dtype, copy=True)
    return value, solution.status, solution.iterations, solution.residual, rejects


def _fake(value: Tensor, solver: str, *inputs: Tensor) -> Outputs:
    batch = value.shape[0]
    return (
        torch.empty_like(value, memory_format=torch.contiguous_format),
        value.new_empty(batch, dtype=torch.int8),
        value.new_empty(batch, dtype=torch.int32),
        value.new_empty(batch, dtype=working_dtype(*inputs)),
        value.new_empty(batch, len(SOLVERS[solver].rejects), dtype=torch.int32),
    )


@torch.library.register_fake("fastdeq::solve_affine")
def _solve_affine_fake(
    weight: Tensor, injection: Tensor, start: Tensor, activation: str, solver: str, *_: Any
) -> Outputs:
    return _fake(injection, solver, weight, injection, start)


@torch.library.register_fake("fastdeq::solve_affine_adjoint")
def _solve_affine_adjoint_fake(
    weight: Tensor, slope: Tensor, grad: Tensor, solver: str, *_: Any
) -> Outputs:
    return _fake(grad, solver, weight, slope, grad)


def chosen(name: str, backend: str, device: torch.device) -> Callable[..., Outputs]:
    """The whole solve ``name`` in the form that ``backend`` names, for tensors on ``device``."""
    anderson_mix = ops.implementation(backend, device)
    if backend == "auto":
        return getattr(torch.ops.fastdeq, name)  # type: ignore[no-any-return]
    return functools.partial(_BODIES[name], anderson_mix=anderson_mix)
