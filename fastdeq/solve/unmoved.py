"""States after no steps at all: a zero gradient, instead of none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .closure import Map, evaluate


def attach_unmoved(f: Map, z: Tensor) -> Tensor:
    """A copy of z ``(B, n)`` whose gradient is zero for all that f closes over, so that a batch
    that makes no step can be differentiated like any other."""
    attached: Tensor = Unmoved.apply(z.detach(), *evaluate(f, z.detach()).theta)
    return attached


class Unmoved(Function):
    """A copy of a state, with zeros as the gradient of ``tensors``, whatever values f has: zero
    times its derivatives would be NaN where these are not finite."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        zeros: list[Tensor] = [torch.zeros_like(t) for t in tensors]
        if torch.is_grad_enabled():  # to be differentiated again
            zeros = [Unmoved.apply(t, grad, *tensors) for t in zeros]
        return None, *zeros
