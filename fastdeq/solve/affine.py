"""The path of an affine cell: the whole solve is one operator, and so is its adjoint.

Where nothing unusual is asked for, the compiled extension makes the injection, the solve and the
node of the graph in one call (csrc/affine_node.cpp); ``solve_affine`` does the same in Python, for
every device, dtype, transform and compiler.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..activations import ACTIVATIONS
from ..backends import extension
from ..errors import BackendError
from ..gradients import Reversible
from ..solution import Solution
from . import affine_tracked, transformed
from .affine_autograd import AffineFixedPoint, affine_gradients
from .autograd import one_step
from .batched_gradients import for_each
from .shapes_only import has_no_numbers
from .spec import Report, SolveSpec, Specs

# The size from which on packing a symmetric weight for one solve takes longer than the way through
# Python, where its packed form is found again. Measured: 4 us at 32, 21 at 256, 1000 at 1024.
_PACKED_ONCE_FROM = 384


def solve_affine(
    weight: Tensor,
    injection: Tensor,
    start: Tensor | None,
    activation: str,
    specs: Specs,
    report: Report,
    finite: Tensor | None = None,
) -> tuple[Tensor, Solution]:
    """``z = phi(z W^T + c)``: weight ``(d, d)``, injection and start ``(B, d)``.

    Without a start it starts from zeros. ``report`` receives the adjoint's solution. Samples that
    are not ``finite`` ``(B,)`` bool (None: all are) end NONFINITE with zeros.

    Raises:
        BackendError: an explicit backend or precision that cannot be had, for the adjoint as well
            where a gradient is requested.
    """
    c = injection
    if finite is not None:
        finite = finite.unsqueeze(1)
        c = torch.where(finite, injection, torch.nan)  # every engine ends such samples at once
        start = None if start is None else torch.where(finite, start, 0.0)
    if transformed.is_active():
        return transformed.solve_affine_under_transforms(
            weight, injection, start, activation, specs, report, finite
        )
    needs_grad = torch.is_grad_enabled() and (weight.requires_grad or injection.requires_grad)
    if needs_grad and specs.options.gradient == "implicit":
        specs.forward.engine(c, weight, start)
        specs.adjoint.engine(c, weight, start)
        packed = specs.packed_weight(weight, c, start)
        z, *outputs = AffineFixedPoint.apply(specs, activation, report, weight, c, start, packed)
        return z, specs.forward.solution(outputs, specs.structure.contraction)
    if isinstance(specs.options.gradient, Reversible) and not has_no_numbers(c):
        return affine_tracked.reversible(
            specs, weight, injection, start, activation, report, finite
        )
    # A compiled program would pack for this solve alone; the engine does so in memory that stays.
    packed = None if torch.compiler.is_compiling() else specs.packed_weight(weight, c, start)
    outputs = specs.forward.forward(weight.detach(), c.detach(), start, activation, False, packed)
    solution = specs.forward.solution(outputs, specs.structure.contraction)
    value = outputs[0]
    if not needs_grad:
        return value.clone(), solution  # what comes next may write to it
    if specs.options.gradient != "one_step" and not has_no_numbers(value):
        return affine_tracked.attach(
            specs, weight, injection, start, activation, solution
        ), solution
    phi = ACTIVATIONS[activation].function
    failed = solution.nonfinite.unsqueeze(1)
    attached = one_step(lambda rows: phi(torch.addmm(injection, rows, weight.t())), value)
    return torch.where(failed, value, attached), solution


def linear_parameters(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """U and b of a module that is nothing but ``U x + b``, with nobody listening; else None."""
    if type(module) is not nn.Linear or _has_any_global_hook():
        return None
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    ):
        return None
    parameters = own["_parameters"]
    weight = parameters.get("weight")
    return None if weight is None or "bias" not in parameters else (weight, parameters["bias"])


def plan_for(specs: Specs, weight: Tensor, activation: str) -> Any:
    """The extension's ``AffinePlan`` for solves with ``weight`` ``(d, d)``, made once for each
    dtype, size and activation; None where they have to go through Python."""
    if _backward_is_compiled():
        return None
    key = (weight.dtype, weight.shape[0], activation, torch.is_grad_enabled(), weight.device.type)
    if key not in specs.plans:
        specs.plans[key] = _make_plan(specs, weight, *key[2:4])
    return specs.plans[key]


def _backward_is_compiled() -> bool:
    """Whether compiled autograd is on: it traces nodes in Python alone."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and (
        module.compiled_autograd_enabled or sys.modules["torch._dynamo"].config.compiled_autograd
    )


def _make_plan(specs: Specs, weight: Tensor, activation: str, differentiable: bool) -> Any:
    # A large symmetric weight is packed once for many solves, by the path in Python.
    if (
        extension.module is None
        or weight.device.type != "cpu"
        or weight.dtype not in (torch.float32, torch.float64)
        or (specs.structure.bitwise_symmetric and len(weight) >= _PACKED_ONCE_FROM)
        or (differentiable and specs.options.gradient != "implicit")
        or (differentiable and specs.options.adjoint_limit is not None)
        or isinstance(specs.options.gradient, Reversible)
    ):
        return None
    rows = weight.detach()
    try:
        sides = [specs.forward, *([specs.adjoint] if differentiable else [])]
        if any(side.engine(rows) != "cpp" for side in sides):
            return None
    except (BackendError, ValueError):  # raised again by the path in Python, where it matters
        return None
    prepared = [(side.bitwise_symmetric, "cpp", *side.arguments) for side in sides]
    return extension.module.AffinePlan(
        size=len(weight),
        dtype=weight.dtype,
        activation=activation,
        forward=prepared[0],
        adjoint=prepared[1] if differentiable else None,
        forward_spec=sides[0],
        adjoint_spec=sides[-1],
        contraction=specs.structure.contraction,
        backward=_backward,
    )


def _backward(
    spec: SolveSpec,
    record: Any,
    activation: str,
    needed: tuple[bool, bool, bool, bool],
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    z: Tensor,
    status: Tensor,
    slope: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of W, x, U and b for the extension's node, by operations that can be
    differentiated again."""
    weight, x, input_weight, bias = inputs
    c = nn.functional.linear(x, input_weight, bias)
    how = (spec, activation, record.receive_adjoint, needed[0], weight, c, z, status, slope, None)

    def gradients(grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_weight, q = affine_gradients(*how, grad)
        return (
            grad_weight,
            q @ input_weight if needed[1] else None,
            q.t() @ x if needed[2] else None,
            q.sum(0) if needed[3] and bias is not None else None,
        )

    return for_each(gradients, grad)
