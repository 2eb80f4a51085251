"""What both engines do on the host: empty outputs, limits, the device, the precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..solvers import SOLVERS
from ..solvers.solve_options import SolveOptions

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Outputs(NamedTuple):
    """Of B samples of size n; ``fields`` are in the order of the operators."""

    value: Tensor  # (B, n)
    status: Tensor  # (B,) int8
    iterations: Tensor  # (B,) int32
    residual: Tensor  # (B,) float32
    rejects: Tensor  # (B, counters) int32


def empty_outputs(like: Tensor, options: SolveOptions) -> Outputs:
    """For a solve whose value is as ``like`` ``(B, n)``."""
    batch = len(like)
    return Outputs(
        value=torch.empty_like(like, memory_format=torch.contiguous_format),
        status=like.new_empty(batch, dtype=torch.int8),
        iterations=like.new_empty(batch, dtype=torch.int32),
        residual=like.new_empty(batch, dtype=torch.float32),
        rejects=like.new_empty(batch, len(SOLVERS[options.solver].rejects), dtype=torch.int32),
    )


def empty_slope(like: Tensor, with_slope: bool) -> Tensor:
    """phi' at the value, float32; without entries unless asked for."""
    return like.new_empty(like.shape if with_slope else (0,), dtype=torch.float32)


def limits(options: SolveOptions) -> dict[str, Any]:
    """When a sample stops, as arguments of a kernel."""
    return {
        "max_iter": options.updates,
        "patience": options.patience,
        "tol": options.tol,
        "atol": options.atol,
    }


def window_of(options: SolveOptions) -> int:
    """Differences that Anderson acceleration can use; 0 for any other solver."""
    return options.most_differences if options.solver == "anderson" else 0


def why_no_dtype(dtype: torch.dtype) -> str:
    """Why a solve in ``dtype`` is not supported; empty where it is."""
    return "" if dtype in FLOATS else f"it solves in float32, not in {dtype}"


def on_device(t: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device_of(t) if t.is_cuda else nullcontext()


def product_precision(t: Tensor) -> str:
    """Of a kernel's own float32 products: "tf32x3" where there are tensor cores for it."""
    tensor_cores = t.is_cuda and torch.cuda.get_device_capability(t.device) >= (8, 0)
    return "tf32x3" if tensor_cores else "ieee"
