"""Implicit gradients of fixed points, differentiable any number of times.

General map, ``z = f(z)`` with f closing over tensors theta. The implicit function theorem gives
``dL/dtheta = u^T df/dtheta`` with ``u = g + J^T u``, ``g = dL/dz*``, ``J = df/dz`` at z*. Theta is
found in the graph of one evaluation of f, and ``FixedPoint`` takes it as input. The equation for u
is a fixed point too, closing over g, z* and theta, so ``FixedPoint`` solves it, and derivatives of
every order follow from the one rule.

Affine cell, ``z = phi(W z + c)``: in ``q = D u`` the adjoint is ``q = D (g + q W)``, and
``dL/dc = q``, ``dL/dW = q^T z*``. ``LinearSolve`` solves it; its own gradient, for a cotangent h,
needs ``p = D (h + p W^T)``, the same solve with W transposed:
``dL/dg = p``, ``dL/dD = (h + p W^T) (g + q W)``, ``dL/dW = q^T p``.

A sample that ended NONFINITE returns a constant, so its gradient is zero. A gradient that arrives
with NaN or infinity leaves as NaN, as anywhere in PyTorch: gradient scalers look for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..activations import ACTIVATIONS
from ..ops.solve_affine_adjoint import unit_rows
from ..ops.solve_common import expanded_zeros
from ..solution import Status
from .closure import cut_above, evaluate, placed_above, same_closure
from .spec import Map, Report, SolveSpec, Specs, ignore


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
        z: Tensor,
        *theta: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.spec, ctx.report, ctx.f, ctx.at, ctx.fz = spec, report, f, at, fz
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
            return (None,) * (6 + len(theta))
        differentiable = torch.is_grad_enabled()
        if ctx.fz is not None and not differentiable:
            u = _solve_adjoint(ctx.spec, ctx.report, ctx.fz, ctx.at, grad, None)
            return None, None, None, None, u, None, *[None] * len(theta)
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
        return None, None, None, None, None, None, *grads


def _solve_adjoint(
    spec: SolveSpec,
    report: Report,
    fz: Tensor,
    at: Tensor,
    grad: Tensor,
    theta: Sequence[Tensor] | None,
) -> Tensor:
    """``u = g + J^T u`` with ``J = dfz/dat``, rows ``(B, n)``; differentiable if theta is given."""
    report(None)

    def product(u: Tensor) -> Tensor | None:
        if not fz.requires_grad:
            return None
        return torch.autograd.grad(
            fz,
            at,
            u,
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )[0]  # None where the map does not depend on z

    unit = unit_rows(grad)
    if theta is None and spec.is_compiled(grad) and (scale := unit.factors()) is not None:
        norm, largest = unit.norm, unit.largest
        del unit
        with torch.no_grad():
            solution = spec.iterate_affine(product, grad, scale)
        value: Tensor = solution.value.mul_(norm).mul_(largest)
        report(solution)
        return value.clone()

    g = unit.rows

    def adjoint_map(u: Tensor) -> Tensor:
        found = product(u)
        return g.clone() if found is None else g + found

    with torch.no_grad():
        if theta is None and spec.is_compiled(g):
            solution = spec.iterate_affine(product, g, g.new_ones(len(g)))
        else:
            solution = spec.iterate(adjoint_map, expanded_zeros(g), lambda u: g)
    report(solution.with_value(unit.restore(solution.value)))
    u = _propagate_nonfinite(solution.value, grad)
    if theta is None:
        return unit.restore(u)
    closed_over = [t for t in (g, at, *theta) if t.requires_grad]
    attached, _ = FixedPoint.apply(spec, ignore, adjoint_map, None, None, u, *closed_over)
    return unit.restore(attached)


def attach(spec: SolveSpec, report: Report, f: Map, z: Tensor) -> Tensor:
    """A copy of z, a solution of ``z = f(z)`` as rows, with implicit gradients of all that f closes
    over."""
    at, fz, theta = evaluate(f, z)
    if forward_ad.unpack_dual(fz).tangent is not None:
        raise NotImplementedError("fastdeq has no forward-mode derivatives; use reverse mode.")
    if not theta:
        return z.detach().clone()
    arguments = (spec, report, same_closure(f, theta), at, fz, z.detach())
    attached: Tensor = FixedPoint.apply(*arguments, *theta)[0]
    return attached


def one_step(f: Map, z: Tensor) -> Tensor:
    """z with the gradient of one application of f at z."""
    z = z.detach()
    fz = f(z)
    return fz + (z - fz).detach()


class AffineFixedPoint(Function):
    """``z = phi(z W^T + c)`` from a start: z twice, and the other outputs of the operator.

    The first z is for the caller, who may write to it; the second is what the operator returned and
    what is saved. Both are differentiable, so that a derivative of the gradient finds its way back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        specs: Specs,
        activation: str,
        report: Report,
        weight: Tensor,
        c: Tensor,
        start: Tensor | None,
        packed: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs = specs.forward.forward(weight, c, start, activation, True, packed)
        z, status, *_, slope = outputs
        ctx.spec, ctx.activation, ctx.report = specs.adjoint, activation, report
        ctx.save_for_backward(weight, c, z, status, slope, packed)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return z.clone(), *outputs

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_saved: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        if grad_saved is not None:
            grad = grad_saved if grad is None else grad + grad_saved
        if grad is None:
            return (None,) * 7
        weight, c, z, status, slope, packed = ctx.saved_tensors
        how = (ctx.spec, ctx.activation, ctx.report, ctx.needs_input_grad[3])
        grad_weight, grad_c = affine_gradients(*how, weight, c, z, status, slope, packed, grad)
        return None, None, None, grad_weight, grad_c, None, None


def affine_gradients(
    spec: SolveSpec,
    activation: str,
    report: Report,
    needs_weight: bool,
    weight: Tensor,
    c: Tensor,
    z: Tensor,
    status: Tensor,
    slope: Tensor,
    packed: Tensor | None,
    grad: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of W (None unless it is needed) and of c for the gradient ``(B, d)`` of
    ``z = phi(z W^T + c)``, differentiable again where grad mode is on."""
    dtype = slope.dtype
    w, at, g = weight.to(dtype), z.to(dtype), grad.to(dtype)
    grad_weight = None
    if not torch.is_grad_enabled():
        q = spec.adjoint(w, slope, g, packed, report)
        if needs_weight:
            with _without_autocast(z.device.type):
                grad_weight = torch.mm(q.t(), at).to(weight.dtype)
        return grad_weight, q.to(c.dtype)
    # A derivative of this gradient needs D as a function of what it depends on.
    with _without_autocast(z.device.type):
        failed = (status == int(Status.NONFINITE)).unsqueeze(1)
        pre = torch.addmm(c.to(dtype), at, w.t())
        slope = ACTIVATIONS[activation].slope(torch.where(failed, 0.0, pre))
        q = LinearSolve.apply(spec, report, w, slope, torch.where(failed, 0.0, g))
        if needs_weight:
            grad_weight = (q.t() @ at).to(weight.dtype)
    return grad_weight, q.to(c.dtype)


class LinearSolve(Function):
    """``q = D (g + q W)`` per row, from weight W ``(d, d)``, slope D and gradient g ``(B, d)``."""

    @staticmethod
    def forward(
        ctx: Any, spec: SolveSpec, report: Report, weight: Tensor, slope: Tensor, grad: Tensor
    ) -> Tensor:
        q = spec.adjoint(weight, slope, grad, None, report)
        ctx.spec = spec
        ctx.save_for_backward(weight, slope, grad, q)
        ctx.set_materialize_grads(False)
        return q

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if h is None:
            return (None,) * 5
        weight, slope, grad, q = ctx.saved_tensors
        with _without_autocast(h.device.type):
            p = LinearSolve.apply(ctx.spec, ignore, weight.t(), slope, h)
            grad_slope = (h + p @ weight.t()) * (grad + q @ weight)
            return None, None, q.t() @ p, grad_slope, p


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def rerun_autocast(f: Map, device_type: str) -> Map:
    """f under the autocast state of now, so that a gradient computed later sees the same map.

    Without autocast's weight cache: a cast that was cached before would hide its parameter.
    """
    if not torch.is_autocast_enabled(device_type):
        return f
    dtype = torch.get_autocast_dtype(device_type)

    def run(z: Tensor) -> Tensor:
        with torch.autocast(device_type, dtype=dtype, cache_enabled=False):
            return f(z)

    return run
