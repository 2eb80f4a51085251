"""The engines for the solve of an affine cell on a GPU: what each can serve, and their order.

There are three, in two backends:

    persistent   cuda     W stays on the chip; one launch per solve
    whole_solve  triton   small d: one launch per solve
    steps        triton   two launches per iteration, narrow products, every solver

docs/gpu.md says what the order rests on.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import affine, extension, ops
from .gpus import Gpu

# What csrc/cpu/solve_affine.cpp and the engines of csrc/cuda/ serve themselves.
CPP_SOLVERS = ("picard", "neumann", "anderson", "heavy_ball", "energy", "minres")
CUDA_SOLVERS = ("picard", "neumann", "anderson", "heavy_ball")

# Multiply-adds of one product, d * d * B, up to which the persistent engine is preferred. Beyond,
# narrow products on the matrix units gain more than the launches cost: by datasheet rates of an
# H100 at two thirds of their peak, not by measurement.
PERSISTENT_WORK = 2e8
_LEAST_CAPABILITY = (8, 0)


class Request(NamedTuple):
    """A solve, as far as the choice depends on it; ``dtype`` is what it runs in."""

    device_type: str
    dtype: torch.dtype
    size: int
    batch: int
    solver: str
    options: tuple[float, ...]
    precision: str = "auto"
    symmetric: bool = False
    gpu: Gpu | None = None  # None on a CPU: Triton's interpreter
    recorded: bool = False  # in a CUDA graph


class Engine(NamedTuple):
    """One way to run a solve. ``why_not`` says why it cannot, and is empty where it can;
    ``forms`` gives the functions ``solve_affine`` and ``solve_affine_adjoint``."""

    name: str
    backend: str
    why_not: Callable[[Request], str]
    forms: Callable[[str], Callable[..., affine.Outputs]]
    preferred: Callable[[Request], bool] = lambda request: True


def _no_cuda(request: Request) -> str:
    reason = ops.why_unavailable("cuda", request.device_type)
    if reason:
        return reason
    if request.solver not in CUDA_SOLVERS:
        return f"it has no solver {request.solver!r}, only {', '.join(map(repr, CUDA_SOLVERS))}"
    assert request.gpu is not None
    if request.gpu.capability < _LEAST_CAPABILITY:
        major, minor = request.gpu.capability
        return f"it needs compute capability 8.0, this device has {major}.{minor}"
    return ""


def _no_persistent(request: Request) -> str:
    if request.precision == "mixed":
        return "it has no narrow products"
    reason = _no_cuda(request)
    if reason:
        return reason
    assert request.gpu is not None
    assert extension.module is not None
    window = int(request.options[0]) if request.solver == "anderson" else 0
    why: str = extension.module.why_not_persistent(
        request.size,
        request.batch,
        request.dtype.itemsize,
        window,
        request.gpu.multiprocessors,
        request.gpu.shared_memory,
    )
    return why


def _no_whole_solve(request: Request) -> str:
    if request.precision == "mixed":
        return "it has no narrow products"
    reason = ops.why_unavailable("triton", request.device_type)
    if reason:
        return reason
    from .kernels import whole_solve

    shared_memory = None if request.gpu is None else request.gpu.shared_memory
    found: str = whole_solve.why_not(
        request.solver, request.options, request.size, request.dtype, shared_memory
    )
    return found


def _no_steps(request: Request) -> str:
    reason = ops.why_unavailable("triton", request.device_type)
    if reason:
        return reason
    from .kernels import solve_affine

    found: str = solve_affine.why_not(request.solver, request.options, request.dtype)
    return found


def _kernels(module: str, name: str) -> Callable[..., affine.Outputs]:
    kernels = importlib.import_module(f"fastdeq.kernels.{module}")
    found: Callable[..., affine.Outputs] = getattr(kernels, name)
    return found


def _operator(suffix: str, name: str) -> Callable[..., affine.Outputs]:
    found: Callable[..., affine.Outputs] = getattr(torch.ops.fastdeq, f"{name}_{suffix}")
    return found


ENGINES = (
    Engine(
        "persistent",
        "cuda",
        _no_persistent,
        functools.partial(_operator, "persistent"),
        lambda request: request.size**2 * request.batch <= PERSISTENT_WORK,
    ),
    Engine("whole_solve", "triton", _no_whole_solve, functools.partial(_kernels, "whole_solve")),
    Engine("steps", "triton", _no_steps, functools.partial(_kernels, "solve_affine")),
)


def choose(request: Request, backend: str = "auto") -> Engine | None:
    """The first engine of ``backend`` that can serve ``request`` and is preferred for it, or else
    the first that can; None where none can."""
    able = None
    for engine in ENGINES:  # an engine is asked only if none before it serves: triton loads slowly
        if backend in ("auto", engine.backend) and not engine.why_not(request):
            if engine.preferred(request):
                return engine
            able = able or engine
    return able


def reasons(request: Request, backend: str = "auto") -> str:
    """Why the engines of ``backend`` cannot serve ``request``."""
    found = {e.name: e.why_not(request) for e in ENGINES if backend in ("auto", e.backend)}
    return "; ".join(f"{name}: {reason}" for name, reason in found.items() if reason)
