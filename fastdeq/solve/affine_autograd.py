"""Implicit gradients of affine cells, differentiable any number of times.

``z = phi(W z + c)``: in ``q = D u`` the adjoint is ``q = D (g + q W)``, and
``dL/dc = q``, ``dL/dW = q^T z*``. ``LinearSolve`` solves it; its own gradient, for a cotangent h,
needs ``p = D (h + p W^T)``, the same solve with W transposed:
``dL/dg = p``, ``dL/dD = (h + p W^T) (g + q W)``, ``dL/dW = q^T p``.

A sample that ended NONFINITE returns a constant, so its gradient is zero. A gradient that arrives
with NaN or infinity leaves as NaN, as anywhere in PyTorch: gradient scalers look for it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual

from ..activations import ACTIVATIONS
from ..solution import Status
from .adjoint_limit import limited_affine
from .batched_gradients import for_each, is_batched, stacked, tangent_of
from .spec import Report, SolveSpec, Specs, ignore


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

        def gradients(grad: Tensor) -> tuple[Tensor | None, ...]:
            return affine_gradients(*how, weight, c, z, status, slope, packed, grad)

        grad_weight, grad_c = for_each(gradients, grad)
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
    if not torch.is_grad_enabled() and not is_batched(grad):
        if spec.limit is None:
            q = spec.adjoint(w, slope, g, packed, report)
        else:
            with without_autocast(z.device.type):
                q = limited_affine(
                    spec, report, lambda s, r: s.adjoint(w, slope, g, packed, r), w, g
                )
        if needs_weight:
            with without_autocast(z.device.type):
                grad_weight = torch.mm(q.t(), at).to(weight.dtype)
        return grad_weight, q.to(c.dtype)
    # A derivative of this gradient needs D as a function of what it depends on.
    with without_autocast(z.device.type):
        failed = (status == int(Status.NONFINITE)).unsqueeze(1)
        pre = torch.addmm(c.to(dtype), at, w.t())
        slope = ACTIVATIONS[activation].slope(torch.where(failed, 0.0, pre))
        g = torch.where(failed, 0.0, g)
        if spec.limit is None:
            q = LinearSolve.apply(spec, report, w, slope, g)
        else:
            q = limited_affine(
                spec, report, lambda s, r: LinearSolve.apply(s, r, w, slope, g), w, g
            )
        if needs_weight:
            grad_weight = (q.t() @ at).to(weight.dtype)
    return grad_weight, q.to(c.dtype)


class LinearSolve(Function):
    """``q = D (g + q W)`` per row, from weight W ``(d, d)``, slope D and gradient g ``(B, d)``."""

    @staticmethod
    def forward(
        spec: SolveSpec, report: Report, weight: Tensor, slope: Tensor, grad: Tensor
    ) -> Tensor:
        return spec.adjoint(weight, slope, grad, None, report)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.spec, _, weight, slope, grad = inputs
        ctx.save_for_backward(weight, slope, grad, output)
        ctx.save_for_forward(weight, slope, grad, output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if h is None:
            return (None,) * 5
        weight, slope, grad, q = ctx.saved_tensors

        def gradients(h: Tensor) -> tuple[Tensor | None, ...]:
            p = LinearSolve.apply(ctx.spec, ignore, weight.t(), slope, h)
            return q.t() @ p, (h + p @ weight.t()) * (grad + q @ weight), p

        with without_autocast(h.device.type):
            return None, None, *for_each(gradients, h)

    @staticmethod
    def jvp(
        ctx: Any,
        _spec: None,
        _report: None,
        weight_moved: Tensor | None,
        slope_moved: Tensor | None,
        grad_moved: Tensor | None,
    ) -> Tensor:
        weight, slope, grad, q = (unpack_dual(t).primal for t in ctx.saved_tensors)

        def tangent(*moved: Tensor | None) -> tuple[Tensor]:
            by_weight, by_slope, by_grad = moved
            e = torch.zeros_like(q)  # dq = e + D (dq W)
            if by_grad is not None:
                e = e + slope * by_grad
            if by_weight is not None:
                e = e + slope * (q @ by_weight)
            if by_slope is not None:
                e = e + by_slope * (grad + q @ weight)
            return (e + LinearSolve.apply(ctx.spec, ignore, weight, slope, e @ weight),)

        return tangent_of(tangent, weight_moved, slope_moved, grad_moved)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        spec: SolveSpec,
        report: Report,
        weight: Tensor,
        slope: Tensor,
        grad: Tensor,
    ) -> tuple[Tensor, int]:
        count = info.batch_size
        tensors = (weight, slope, grad)
        many = [stacked(t, dim, count) for t, dim in zip(tensors, in_dims[2:], strict=True)]
        if in_dims[2] is not None:
            systems = zip(*many, strict=True)
            return torch.stack([LinearSolve.apply(spec, report, *each) for each in systems]), 0
        rows = [t.flatten(0, 1) for t in many[1:]]
        return LinearSolve.apply(spec, report, weight, *rows).unflatten(0, (count, -1)), 0


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off for a device, where it is on."""
    # The meta device has none.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
