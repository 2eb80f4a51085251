"""Implicit gradients of fixed points, differentiable any number of times.

General map, ``z = f(z)`` with f closing over tensors theta. The implicit function theorem gives
``dL/dtheta = u^T df/dtheta`` with ``u = g + J^T u``, ``g = dL/dz*``, ``J = df/dz`` at z*. Theta is
found in the graph of one evaluation of f, and ``FixedPoint`` takes it as input. The equation for u
is a fixed point too, closing over g, z* and theta, so ``FixedPoint`` solves it, and derivatives of
every order follow from the one rule.

A sample that ended NONFINITE returns a constant, so its gradient is zero. A gradient that arrives
with NaN or infinity leaves as NaN, as anywhere in PyTorch: gradient scalers look for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..ops.solve_affine_adjoint import as_they_are, unit_rows
from ..ops.solve_common import expanded_zeros
from ..solution import Solution
from .adjoint_limit import limits_adjoint
from .batched_gradients import as_one, is_batched
from .closure import cut_above, evaluate, placed_above, same_closure
from .compaction import autocasts
from .sharding import distributed_now
from .spec import Map, Report, SolveSpec, ignore, without_first
from .unfinished import Product, Unfinished

#: Evaluates the map of some samples, whose value is known, if there is one that agrees with it; see
#: ``compaction.Compaction.agreeing``.
Parts = Callable[[Tensor, Tensor, Callable[[Map], tuple[Tensor, Product]]], Product | None]


def _propagate_nonfinite(result: Tensor, grad: Tensor) -> Tensor:
    return torch.where(grad.isfinite().all(1, keepdim=True), result, torch.nan)


class FixedPoint(Function):
    """z*, a solution of ``z = f(z)`` as rows, as a function of theta, the tensors f closes over:
    twice, the first for the caller, who may write to it; the second is z itself, and saved.

    ``at`` is a copy of z* and ``fz`` is f of it, where f was already evaluated under autograd. Then
    the first derivative goes out through the graph of fz, so that hooks on theta run once; a
    gradient that is to be differentiated again goes to theta itself. Every vector-Jacobian product
    is one with respect to a state that lies above theta in the graph, where autograd stops.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: SolveSpec,
        report: Report,
        f: Map,
        at: Tensor | None,
        fz: Tensor | None,
        parts: Parts | None,
        z: Tensor,
        *theta: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.spec, ctx.report, ctx.f, ctx.at, ctx.fz = spec, report, f, at, fz
        ctx.parts = parts
        saved = z.view_as(z)
        ctx.save_for_backward(saved, *theta)
        ctx.set_materialize_grads(False)
        return z.clone(), saved

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_saved is not None:
            grad = grad_saved if grad is None else grad + grad_saved
        z, *theta = ctx.saved_tensors
        if grad is None:
            return (None,) * (7 + len(theta))
        if is_batched(grad):
            many = functools.partial(_many_gradients, ctx.spec, ctx.report, ctx.f, z, theta)
            return None, None, None, None, None, None, None, *as_one(many, grad)
        differentiable = torch.is_grad_enabled()
        if ctx.fz is not None and not differentiable:
            u = _solve_adjoint(ctx.spec, ctx.report, ctx.fz, ctx.at, grad, None, ctx.parts)
            return None, None, None, None, u, None, None, *[None] * len(theta)
        # A derivative of this gradient needs f as a function of z*, which depends on theta.
        at = z if differentiable else placed_above(z, theta)
        with torch.enable_grad():
            fz = ctx.f(at)
        closed_over = theta if differentiable else None
        u = _solve_adjoint(ctx.spec, ctx.report, fz, at, grad, closed_over)
        grads: Sequence[Tensor | None] = [None] * len(theta)
        if fz.requires_grad and theta:
            with cut_above([at, *theta]):
                grads = torch.autograd.grad(
                    fz, theta, u, retain_graph=True, create_graph=differentiable, allow_unused=True
                )
        return None, None, None, None, None, None, None, *grads


@limits_adjoint
def _solve_adjoint(
    spec: SolveSpec,
    report: Report,
    fz: Tensor,
    at: Tensor,
    grad: Tensor,
    theta: Sequence[Tensor] | None,
    parts: Parts | None = None,
    count: int | None = None,
) -> Tensor:
    """``u = g + J^T u`` with ``J = dfz/dat``, rows ``(B, n)``; differentiable if theta is given.
    With ``parts``, products are made for samples that are not finished; with a ``count``, there
    are so many gradients, ``(count * B, n)``."""
    report(None)
    product = functools.partial(_product, fz, at, count=count)

    def narrow(samples: Tensor, rows: Any = None, value: Any = None) -> Product | None:
        expected, rows = (t.detach().index_select(0, samples) for t in (fz, at))

        def run(part: Map) -> tuple[Tensor, Product]:
            again = evaluate(part, rows)
            return again.value.detach(), functools.partial(_product, again.value, again.at)

        return None if parts is None else parts(samples, expected, run)

    def products() -> Product:
        if parts is None:
            return product
        return Unfinished(product, narrow, len(at), asks_value=False)

    together = spec.options.fixed_iterations and distributed_now()
    unit = as_they_are(grad) if together else unit_rows(grad)
    if theta is None and spec.is_compiled(grad) and (scale := unit.factors()) is not None:
        norm, largest = unit.norm, unit.largest
        del unit
        with torch.no_grad():
            solution = spec.iterate_affine(products(), grad, scale)
        value: Tensor = solution.value.mul_(norm).mul_(largest)
        report(solution)
        return value.clone()

    g = unit.rows

    def adjoint_map(u: Tensor) -> Tensor:
        found = product(u)
        return g.clone() if found is None else g + found

    def narrow_map(samples: Tensor, rows: Any, value: Any) -> Product | None:
        found, own = narrow(samples), g.index_select(0, samples)
        return None if found is None else lambda u: own if (p := found(u)) is None else own + p

    iterated: Map = adjoint_map
    if parts is not None and theta is None:
        iterated = Unfinished(adjoint_map, narrow_map, len(at), asks_value=False)
    with torch.no_grad():
        if theta is None and spec.is_compiled(g):
            solution = spec.iterate_affine(products(), g, g.new_ones(len(g)))
        else:
            solution = without_first(spec.iterate(iterated, expanded_zeros(g), lambda u: g))
    report(solution.with_value(unit.restore(solution.value)))
    u = _propagate_nonfinite(solution.value, grad)
    if theta is None:
        return unit.restore(u)
    closed_over = [t for t in (g, at, *theta) if t.requires_grad]
    how = (replace(spec, begin=None), ignore, adjoint_map, None, None, None)
    # Nothing to begin with: the systems of the next order have other matrices.
    attached, _ = FixedPoint.apply(*how, u, *closed_over)
    return unit.restore(attached)


def _many_gradients(
    spec: SolveSpec, report: Report, f: Map, z: Tensor, theta: list[Tensor], grads: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of theta ``(V, *)`` for V gradients ``(V, B, n)`` of z."""
    differentiable, count = torch.is_grad_enabled(), len(grads)
    at = z if differentiable else placed_above(z, theta)
    with torch.enable_grad():
        fz = f(at)
    closed_over = theta if differentiable else None
    spec = replace(spec, begin=None)  # which is of B rows
    u = _solve_adjoint(spec, report, fz, at, grads.flatten(0, 1), closed_over, count=count)
    zeros = tuple(t.new_zeros(count, *t.shape) for t in theta)
    if not fz.requires_grad:
        return zeros
    with cut_above([at, *theta]):
        found = torch.autograd.grad(
            fz,
            theta,
            u.unflatten(0, (count, -1)),
            retain_graph=True,
            create_graph=differentiable,
            allow_unused=True,
            is_grads_batched=True,
        )
    return tuple(zero if t is None else t for t, zero in zip(found, zeros, strict=True))


def _product(fz: Tensor, at: Tensor, u: Tensor, count: int | None = None) -> Tensor | None:
    """``J^T u`` with ``J = dfz/dat``, for ``count`` batches where it is given; None where the map
    does not depend on z."""
    if not fz.requires_grad:
        return None
    batched = count is not None
    found = torch.autograd.grad(
        fz,
        at,
        u.unflatten(0, (count, -1)) if batched else u,  # type: ignore[arg-type]
        retain_graph=True,
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
        is_grads_batched=batched,
    )[0]
    return found.flatten(0, 1) if batched and found is not None else found


def begun_after(spec: SolveSpec, solution: Solution) -> SolveSpec:
    """The adjoint's spec, its solver beginning with what the forward one handed on."""
    return spec if solution.kept is None else replace(spec, begin=solution.kept.transposed())


def attach(
    spec: SolveSpec, report: Report, f: Map, z: Tensor, parts: Parts | None = None
) -> Tensor:
    """A copy of z, a solution of ``z = f(z)`` as rows, with implicit gradients of all that f closes
    over."""
    at, fz, theta = evaluate(f, z)
    if not theta:
        return z.detach().clone()
    arguments = (spec, report, same_closure(f, theta), at, fz, parts, z.detach())
    attached: Tensor = FixedPoint.apply(*arguments, *theta)[0]
    return attached


def one_step(f: Map, z: Tensor) -> Tensor:
    """z with the gradient of one application of f at z."""
    z = z.detach()
    fz = f(z)
    return fz + (z - fz).detach()


def autocast_of_now(device_type: str) -> Callable[[Map], Map]:
    """What puts a map under the autocast state of now, so that a gradient computed later sees the
    same map.

    Without autocast's weight cache: a cast that was cached before would hide its parameter.
    """
    if not autocasts(device_type):
        return lambda f: f
    dtype = torch.get_autocast_dtype(device_type)

    def around(f: Map) -> Map:
        def run(z: Tensor) -> Tensor:
            with torch.autocast(device_type, dtype=dtype, cache_enabled=False):
                return f(z)

        return run

    return around
