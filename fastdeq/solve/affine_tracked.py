"""Gradients of affine cells other than the implicit one: ``z = phi(z W^T + c)`` as a map of rows,
in the dtype of the solve, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..gradients import Phantom
from ..ops.solve_common import expanded_zeros, working_dtype
from ..solution import Solution
from . import tracked_steps
from .affine_autograd import without_autocast
from .eager import outside_graphs
from .spec import Map, Specs


def rows_map(weight: Tensor, injection: Tensor, activation: str, stopped: Tensor) -> Map:
    """The cell at an injection ``(B, d)``; samples ``stopped`` ``(B,)`` bool have none, and so no
    part in the gradient of W."""
    dtype = working_dtype(weight, injection)
    w = weight.to(dtype)
    c = torch.where(stopped.unsqueeze(1), 0.0, injection).to(dtype)
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
    method, value, stopped = specs.options.gradient, solution.value, solution.nonfinite
    with without_autocast(value.device.type):
        f = rows_map(weight, injection, activation, stopped)
        dtype = working_dtype(weight, injection)
        begin = expanded_zeros(value.to(dtype)) if start is None else start.to(dtype)
        kept = torch.where(stopped.unsqueeze(1), 0.0, value).to(dtype)
        attached = _run(method, f, begin, solution.with_value(kept)).to(value.dtype)
    return torch.where(stopped.unsqueeze(1), value, attached)


def _run(method: Any, f: Map, begin: Tensor, solution: Solution) -> Tensor:
    if isinstance(method, Phantom):
        return tracked_steps.attach(method, f, begin, solution)
    return _counted(method, f, begin, solution)


#: How many steps there are depends on numbers, which no graph can.
_counted = outside_graphs(tracked_steps.attach)
