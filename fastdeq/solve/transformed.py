"""Fixed points under the transforms of ``torch.func``, in forward mode and for batched gradients.

A problem is a map ``f(z, *theta)`` of rows with a way to solve it; z* is a function of theta alone:

    ``dz = (I - J)^-1 (df/dtheta) dtheta``,   ``dL/dtheta = (df/dtheta)^T (I - J)^-T dL/dz``

``FixedPointOf`` has these rules, and ``LinearSolveOf`` solves with ``I - A``, A = J or its
transpose. That is a function of (g, z, theta), ``u = g + A u``, whose own derivatives are

    ``du = (I - A)^-1 (dg + dA u)``,   ``dL/dg = w``,   ``dL/d(z, theta) = d<w, A u>``

with ``w = (I - A)^-T dL/du``: solves again, so that derivatives of every order follow, in either
mode. A batch of problems is one problem of as many samples more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..solution import Solution
from . import transformed_steps
from .batched_gradients import stacked, tangent_of
from .cell_map import CellMap
from .eager import Eagerly
from .explicit import explicit
from .packing import Packing
from .problems import (
    AffineRows,
    GeneralRows,
    Rows,
    gradients_of,
    of_some,
    pullback,
    pushforward,
)
from .spec import Report, Specs


def is_active() -> bool:
    """Whether a transform of ``torch.func`` is going on, or derivatives in forward mode."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or (
        forward_ad._current_level >= 0
    )


class FixedPointOf(Function):
    """z* ``(B, n)`` of a problem, from a start, as a function of theta; and which samples ended
    NONFINITE ``(B,)`` bool."""

    @staticmethod
    def forward(problem: Rows, start: Tensor, *theta: Tensor) -> tuple[Tensor, Tensor]:
        return problem.solve(start, theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.problem, _, *theta = inputs
        z, failed = output
        ctx.save_for_backward(z, *theta)
        ctx.save_for_forward(z, *theta)
        ctx.mark_non_differentiable(failed)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _failed: None) -> tuple[Tensor | None, ...]:
        z, *theta = ctx.saved_tensors
        if grad is None or not theta:
            return (None,) * (2 + len(theta))
        problem = ctx.problem
        u = LinearSolveOf.apply(problem, True, grad, z, *theta)
        return None, None, *gradients_of(lambda *theta: problem.f(z, *theta), theta, u)

    @staticmethod
    def jvp(
        ctx: Any, _problem: None, _start: Tensor | None, *moved: Tensor | None
    ) -> tuple[Tensor, None]:
        problem, (z, *theta) = ctx.problem, _primals(ctx)

        def tangent(*moved: Tensor | None) -> tuple[Tensor]:
            h = _pushed(lambda *theta: problem.f(z, *theta), theta, moved)
            return (LinearSolveOf.apply(problem, False, _or_zeros(h, z), z, *theta),)

        return tangent_of(tangent, *moved), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], problem: Rows, start: Tensor, *theta: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        how = (info.batch_size, info.randomness)
        many, theta = problem.batched(*how, in_dims[2:], theta)
        rows = _folded(start, in_dims[1], info.batch_size)
        z, failed = FixedPointOf.apply(many, rows, *theta)
        shape = (info.batch_size, -1)
        return (z.unflatten(0, shape), failed.unflatten(0, shape)), (0, 0)


class LinearSolveOf(Function):
    """``u = g + A u`` with ``A = J^T`` where ``transpose``, else ``J``, ``J = df/dz`` at z."""

    @staticmethod
    def forward(problem: Rows, transpose: bool, g: Tensor, z: Tensor, *theta: Tensor) -> Tensor:
        return problem.solve_linear(transpose, g, z, theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.problem, ctx.transpose, _, z, *theta = inputs
        ctx.save_for_backward(output, z, *theta)
        ctx.save_for_forward(output, z, *theta)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        u, z, *theta = ctx.saved_tensors
        if grad is None:
            return (None,) * (4 + len(theta))
        problem, transpose = ctx.problem, ctx.transpose
        w = LinearSolveOf.apply(problem, not transpose, grad, z, *theta)
        left, right = (u, w) if transpose else (w, u)  # <w, A u> = <left, J right>

        def bilinear(z: Tensor, *theta: Tensor) -> Tensor:
            pull = pullback(lambda z: problem.f(z, *theta), z)
            total: Tensor = (pull(left)[0] * right).sum()
            return total

        return None, None, w, *gradients_of(bilinear, [z, *theta], u.new_ones(()))

    @staticmethod
    def jvp(
        ctx: Any, _problem: None, _transpose: None, moved_g: Tensor | None, *moved: Tensor | None
    ) -> Tensor:
        problem, transpose, (u, z, *theta) = ctx.problem, ctx.transpose, _primals(ctx)

        def product(z: Tensor, *theta: Tensor) -> Tensor:
            def of_state(z: Tensor) -> Tensor:
                return problem.f(z, *theta)  # type: ignore[no-any-return]

            if transpose:
                return pullback(of_state, z)(u)[0]
            return pushforward(of_state, z)(u)

        def tangent(moved_g: Tensor | None, *moved: Tensor | None) -> tuple[Tensor]:
            h = _pushed(product, [z, *theta], moved)
            if h is None or moved_g is None:
                h = _or_zeros(moved_g if h is None else h, u)
            else:
                h = h + moved_g
            return (LinearSolveOf.apply(problem, transpose, h, z, *theta),)

        return tangent_of(tangent, moved_g, *moved)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        problem: Rows,
        transpose: bool,
        g: Tensor,
        z: Tensor,
        *theta: Tensor,
    ) -> tuple[Tensor, int]:
        count = info.batch_size
        many, theta = problem.batched(count, info.randomness, in_dims[4:], theta)
        rows = _folded(g, in_dims[2], count), _folded(z, in_dims[3], count)
        u = LinearSolveOf.apply(many, transpose, *rows, *theta)
        return u.unflatten(0, (count, -1)), 0


def _primals(ctx: Any) -> list[Tensor]:
    """What was saved, without its tangents: those of this level are passed to the rule."""
    return [forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]


def _pushed(f: Any, at: list[Tensor], moved: tuple[Tensor | None, ...]) -> Tensor | None:
    """The directional derivative of f along ``moved``; None where nothing moves."""
    along = {i: t for i, t in enumerate(moved) if t is not None}
    if not along:
        return None

    moving = list(along)
    return pushforward(of_some(f, at, moving), *[at[i] for i in moving])(*along.values())


def _or_zeros(t: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if t is None else t


def _folded(t: Tensor, dim: int | None, count: int) -> Tensor:
    """Rows ``(B, n)``, batched along ``dim`` or the same for all, as ``(count * B, n)``."""
    return stacked(t, dim, count).flatten(0, 1)


def solve_map_under_transforms(
    f: Callable[[Any], Any], z0: Any, specs: Specs, report: Report
) -> tuple[Any, Solution]:
    """As ``general.solve_map``, under transforms. The solution is that of the innermost solve, of
    as many samples as all transforms make."""
    packing = Packing(z0, specs.options.batch_dim)
    packing.copies = True  # what a transform sees has no versions
    start = packing.pack(z0).detach()
    rows = packing.rowwise(f.pinned() if isinstance(f, CellMap) else f)

    def eager(z: Tensor) -> Tensor:
        with Eagerly():  # compiled code cannot be transformed
            return rows(z)

    by_rows = explicit(eager, start)
    last: list[Any] = []
    parts = packing.parts
    sides = replace(specs.forward, parts=parts), replace(specs.adjoint, parts=parts)
    problem = GeneralRows(by_rows, *sides, last.append, report)
    z = _attached(problem, start, by_rows.theta, specs.options.gradient, last)
    return packing.unpack(z), last[-1]


def solve_affine_under_transforms(
    weight: Tensor,
    c: Tensor,
    start: Tensor | None,
    activation: str,
    specs: Specs,
    report: Report,
    finite: Tensor | None,
) -> tuple[Tensor, Solution]:
    """As ``affine.solve_affine``, under transforms; samples that are not ``finite`` ``(B, 1)`` are
    zero."""
    last: list[Any] = []
    problem = AffineRows(activation, specs, last.append, report)
    start = torch.zeros_like(c) if start is None else start
    z = _attached(problem, start.detach(), [weight, c], specs.options.gradient, last)
    return z if finite is None else torch.where(finite, z, 0.0), last[-1]


def _attached(
    problem: Rows, start: Tensor, theta: list[Tensor], gradient: Any, last: list[Solution]
) -> Tensor:
    """The solution, differentiated as ``gradient`` says; constant for samples that failed."""
    z, failed = FixedPointOf.apply(problem, start, *theta)
    found = z
    if gradient != "implicit":
        found = transformed_steps.attach(
            gradient, lambda z: problem.f(z, *theta), start, z, failed.unsqueeze(1), last[-1]
        )
    return torch.where(failed.unsqueeze(1), z.detach(), found)
