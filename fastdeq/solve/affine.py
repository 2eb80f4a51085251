"""The path of an affine cell: the whole solve is one operator, and so is its adjoint."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..solution import Solution
from .autograd import AffineFixedPoint, one_step
from .spec import Report, Specs


def solve_affine(
    weight: Tensor,
    injection: Tensor,
    start: Tensor | None,
    activation: str,
    specs: Specs,
    report: Report,
) -> tuple[Tensor, Solution]:
    """``z = phi(z W^T + c)``: weight ``(d, d)``, injection and start ``(B, d)``.

    Without a start it starts from zeros. ``report`` receives the adjoint's solution.

    Raises:
        BackendError: an explicit backend or precision that cannot be had, for the adjoint as well
            where a gradient is requested.
    """
    needs_grad = torch.is_grad_enabled() and (weight.requires_grad or injection.requires_grad)
    if needs_grad and specs.options.gradient == "implicit":
        specs.forward.engine(injection, weight, start)
        specs.adjoint.engine(injection, weight, start)
        outputs = AffineFixedPoint.apply(specs, activation, report, weight, injection, start)
    else:
        w, c = weight.detach(), injection.detach()
        outputs = specs.forward.forward(w, c, start, activation, with_slope=False)
    z = outputs[0]
    solution = specs.forward.solution(outputs, specs.structure.contraction)
    if needs_grad and specs.options.gradient == "one_step":
        phi = ACTIVATIONS[activation].function
        failed = solution.nonfinite.unsqueeze(1)
        attached = one_step(lambda rows: phi(torch.addmm(injection, rows, weight.t())), z)
        z = torch.where(failed, z, attached)
    return z, solution
