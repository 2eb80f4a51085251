"""The iteration of any map for tensors on a GPU: what the Triton kernels have of it."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.choose import triton_missing, why_not_device
from ..solvers import Solver


def kind() -> Any:
    """``kernels.iteration.engine.Iteration``; importing triton is slow, so only when it is used."""
    return importlib.import_module("fastdeq.kernels.iteration.engine").Iteration


def supports(solver: Solver, backend: str, start: Tensor) -> bool:
    """Whether the kernels have the iterations of ``solver``, one of those with compiled code, for
    rows like ``start`` ``(B, n)``. On a CPU there is Triton's interpreter, for tests."""
    if start.device.type == "cuda":
        if backend not in ("auto", "triton") or not _has_triton():
            return False
    elif backend != "triton" or start.device.type != "cpu" or why_not_device("triton", "cpu"):
        return False
    if (
        type(start) not in (Tensor, nn.Parameter)
        or torch._C._functorch.is_functorch_wrapped_tensor(start)
        or start.layout is not torch.strided
        or start.dim() != 2
    ):
        return False
    found = kind()
    return start.dtype in found.dtypes and getattr(solver, "window", 0) <= found.most_differences


@functools.cache
def _has_triton() -> bool:
    return not triton_missing()
