"""Gradients of affine cells other than the implicit one: ``z = phi(z W^T + c)`` as a map of rows,
in the dtype of the solve, in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..gradients import Phantom
from ..ops.solve_common import expanded_zeros, working_dtype
from ..solution import Solution
from . import reversible as steps
from . import tracked_steps
from .affine_autograd import without_autocast
from .eager import outside_graphs
from .nonfinite import mark_nonfinite
from .spec import Map, Report, Specs


def _rows_map(weight: Tensor, injection: Tensor, activation: str, stopped: Tensor) -> Map:
    """The cell at an injection ``(B, d)``; samples ``stopped`` ``(B, 1)`` bool have none, and so no
    part in the gradient of W."""
    dtype = working_dtype(weight, injection)
    w = weight.to(dtype)
    c = torch.where(stopped, 0.0, injection).to(dtype)
    phi = ACTIVATIONS[activation].function

    def rows(z: Tensor) -> Tensor:
        with without_autocast(z.device.type):
            return phi(torch.addmm(c, z, w.t()))

    return rows


def attach(
    specs: Specs,
    weight: Tensor,
    injection: Tensor,
    start: Tensor | None,
    activation: str,
    solution: Solution,
) -> Tensor:
    """The end of the steps that ``options.gradient`` differentiates, ``(B, d)``, in the dtype of
    the solution; samples that ended NONFINITE stay as they are."""
    method: Any = specs.options.gradient
    value, stopped = solution.value, solution.nonfinite.unsqueeze(1)
    with without_autocast(value.device.type):
        f = _rows_map(weight, injection, activation, stopped)
        dtype = working_dtype(weight, injection)
        begin = expanded_zeros(value.to(dtype)) if start is None else start.to(dtype)
        kept = solution.with_value(torch.where(stopped, 0.0, value).to(dtype))
        # How many steps the others make depends on numbers, which a graph does not have.
        run = tracked_steps.attach if isinstance(method, Phantom) else _outside
        attached = run(method, f, begin, kept).to(value.dtype)
    return torch.where(stopped, value, attached)


_outside = outside_graphs(tracked_steps.attach)


@outside_graphs
def reversible(
    specs: Specs,
    weight: Tensor,
    injection: Tensor,
    start: Tensor | None,
    activation: str,
    report: Report,
    finite: Tensor | None,
) -> tuple[Tensor, Solution]:
    """``affine.solve_affine`` by the reversible iteration, ``finite`` ``(B, 1)`` or None."""
    dtype = working_dtype(weight, injection)
    with without_autocast(injection.device.type):
        bad = torch.zeros_like(injection[:, :1], dtype=torch.bool) if finite is None else ~finite
        f = _rows_map(weight, injection, activation, bad)
        begin = expanded_zeros(injection.detach().to(dtype)) if start is None else start.to(dtype)
        solution, ends = steps.solve(f, begin, specs.forward, specs.options.gradient, f)
        value = solution.value.to(injection.dtype)
        z = value.clone()  # the caller may write to it
        if torch.is_grad_enabled():
            attached = steps.attach(f, ends, specs.adjoint, report).to(value.dtype)
            z = torch.where(solution.nonfinite.unsqueeze(1), value, attached)
    own = replace(solution.with_value(value), contraction=specs.structure.contraction)
    if finite is not None:
        z, own = mark_nonfinite(z, own, bad[:, 0], (0,))
    return z, own
