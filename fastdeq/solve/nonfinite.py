"""Samples of a layer's input that are not finite: set aside before a solve, reported after it."""

from __future__ import annotations

import cmath
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..samples import BatchDim, as_rows, batch_shape, plain_tensor, resolve, spread
from ..solution import Solution, Status, may_look
from .state_tree import tensors_of


def samples_of(x: Any, start: Any, batch_dim: BatchDim) -> tuple[int, ...] | None:
    """The batch dimensions of x, where it has those of the state ``start``; () where all of x and
    of the state is one sample; None where x is no tensor of samples.

    Behind other dimensions, x counts samples only with as many dimensions as the state: in x
    ``(T, n)`` the second one is not that of a state ``(T, B, d)``, whatever its size.
    """
    parts = tensors_of(start)
    if not isinstance(x, Tensor) or not parts or not all(isinstance(p, Tensor) for p in parts):
        return None  # the solve will say what is wrong with such a state
    dims, state = resolve(batch_dim, parts), parts[0]
    if dims and dims != (0,) and x.dim() != state.dim():
        return None
    if x.dim() <= max(dims, default=-1) or batch_shape(x, dims) != batch_shape(state, dims):
        return None
    return dims


def finite_samples(x: Any, dims: tuple[int, ...] = (0,)) -> tuple[Any, Tensor | None]:
    """x with non-finite samples zeroed, and which are finite ``(B,)``; None where it is known that
    all are, or x is no tensor with the batch dimensions ``dims``."""
    if not isinstance(x, Tensor) or x.dim() < len(dims):
        return x, None
    if not (x.is_floating_point() or x.is_complex()):
        return x, None
    if x.layout is not torch.strided or x.is_nested:
        return x, None
    if _is_surely_finite(x):
        return x, None
    finite = (as_rows(x.detach(), dims) * 0 == 0).all(1)
    zeroed = torch.where(spread(finite, x, dims), x, 0.0)
    return zeroed, plain_tensor(finite)


def mark_nonfinite(
    z: Any, solution: Solution, bad: Tensor, dims: tuple[int, ...]
) -> tuple[Any, Solution]:
    """z and solution with the samples ``bad`` ``(B,)`` reported NONFINITE and set to zero."""
    if not may_look(bad) and may_look(solution.status):
        return zeroed(z, bad, dims), solution  # under a transform: its samples are not the solve's
    marked = dataclasses.replace(
        solution,
        value=zeroed(solution.value, bad, dims),
        status=torch.where(bad, int(Status.NONFINITE), solution.status).to(torch.int8),
        iterations=torch.where(bad, 0, solution.iterations),
        residual=torch.where(bad, torch.inf, solution.residual),
    )
    return zeroed(z, bad, dims), marked


def zeroed(state: Any, bad: Tensor, dims: tuple[int, ...]) -> Any:
    """``state`` with the samples ``bad`` ``(B,)`` set to zero."""

    def zero(part: Tensor) -> Tensor:
        return torch.where(spread(bad, part, dims), 0.0, part)

    return zero(state) if isinstance(state, Tensor) else tree_map(zero, state)


def _is_surely_finite(x: Tensor) -> bool:
    """Whether all of x is finite, where that can be seen without waiting for a device."""
    # A sum is finite only where every entry is.
    return x.device.type == "cpu" and may_look(x) and cmath.isfinite(x.detach().sum().item())
