"""What the forward and the adjoint solve of an affine cell share: outputs, dtypes, engines.

value       (B, d)              the best finite iterate of each sample
status      (B,) int8           fastdeq.Status
iterations  (B,) int32
residual    (B,)                float32 or float64
rejects     (B, reasons) int32  in the order of the solver's ``rejects``
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.choose import BACKENDS, ENGINE_NAMES, ENGINES, Request, require_engine
from ..backends.device import gpu_of
from ..errors import BackendError, check_choice
from ..solution import Solution
from ..solvers import SOLVERS, SolveOptions, Solver

Outputs = tuple[Tensor, ...]
#: Each has a module of fastdeq.kernels with its two solves.
TRITON_ENGINES = tuple(engine.name for engine in ENGINES if engine.backend == "triton")


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype a solve runs in: float64 where any input has it, otherwise float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def expanded_zeros(like: Tensor) -> Tensor:
    """Zeros with the shape of ``like`` in the memory of one number."""
    return like.new_zeros(()).expand(like.shape)


def resolve_engine(engine: str, options: SolveOptions, dtype: torch.dtype, rows: Tensor) -> str:
    """The name of an engine for a solve of ``rows`` ``(B, d)``. Where ``engine`` is a backend's
    name instead ("auto", "triton", "cuda"), the choice is made here and now: a compiled layer does
    not know its batch before it runs."""
    if engine in ENGINE_NAMES:
        return engine
    check_choice(engine, (*ENGINE_NAMES, *BACKENDS), "engine")
    if rows.numel() == 0:
        return "reference"
    batch, size = rows.shape
    device = rows.device
    return require_engine(Request(device.type, dtype, size, batch, options, engine, gpu_of(device)))


def triton_engine(engine: str, function: str) -> Callable[..., Outputs]:
    """The function of an engine in Triton; importing triton is slow, so only when it is used."""
    found: Callable[..., Outputs] = getattr(
        importlib.import_module(f"fastdeq.kernels.{engine}.engine"), function
    )
    return found


def not_here(engine: str, rows: Tensor) -> BackendError:
    """The error for an engine that no implementation for the device of ``rows`` has."""
    return BackendError(
        f"there is no engine {engine!r} for tensors on {rows.device.type} in this build; "
        "engine='auto' takes one that there is."
    )


def solver_class(name: str) -> type[Solver]:
    """The class of a registered solver, or an error with their names."""
    check_choice(name, SOLVERS, "solver")
    return SOLVERS[name]


def as_outputs(solution: Solution, dtype: torch.dtype) -> Outputs:
    """The outputs of an operator: nothing aliases an input or another output."""
    counters = list(solution.rejects.values())
    count = solution.iterations
    rejects = torch.stack(counters, 1) if counters else count.new_empty(len(count), 0)
    value = solution.value.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return value, solution.status, solution.iterations, solution.residual, rejects


def fake_outputs(rows: Tensor, dtype: torch.dtype, solver: str) -> Outputs:
    """Outputs without values, for rows ``(B, d)``."""
    batch = rows.shape[0]
    return (
        torch.empty_like(rows, memory_format=torch.contiguous_format),
        rows.new_empty(batch, dtype=torch.int8),
        rows.new_empty(batch, dtype=torch.int32),
        rows.new_empty(batch, dtype=dtype),
        rows.new_empty(batch, len(SOLVERS[solver].rejects), dtype=torch.int32),
    )
