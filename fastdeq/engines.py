"""Which engine runs the solve of an affine cell: the choice by backend, device, shape and dtype.

On the CPU that is the C++ engine, or the reference; on a GPU one of engine_table.py. What no engine
serves the reference does, unless a backend was asked for by name: then the reasons are the error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import affine, ops
from .engine_table import CPP_SOLVERS, ENGINES, Request, choose, reasons
from .gpus import gpu_of
from .solvers import Solver
from .streams import is_capturing

__all__ = ["ENGINES", "Request", "check_backend", "check_precision", "choose", "chosen", "reasons"]


def _solve(name: str, backend: str, request: Request, arguments: tuple[Any, ...]) -> affine.Outputs:
    if request.batch == 0 or request.size == 0:
        return affine.BODIES[name](*arguments)
    engine = choose(request, backend)
    if engine is not None:
        return engine.forms(name)(*arguments)
    if backend == "auto" and request.precision != "mixed":
        return affine.BODIES[name](*arguments)
    raise _refusal(request, backend)


def _refusal(request: Request, backend: str, what: str = "solve") -> ops.BackendError:
    asked = f"backend={backend!r}" if backend != "auto" else "precision='mixed'"
    return ops.BackendError(
        f"{asked} cannot serve this {what} ({request.solver}, {request.dtype}, "
        f"size {request.size}, {request.batch} samples on {request.device_type}): "
        f"{reasons(request, backend)}. "
        "backend='auto' and precision='auto' serve every solve."
    )


def _request(
    rows: Tensor,
    dtype: torch.dtype,
    solver: str,
    options: Sequence[float],
    max_iter: int,
    precision: str,
    symmetric: bool,
) -> Request:
    batch, size = rows.shape
    device = rows.device
    if solver == "anderson":  # a longer history than there are updates is never used
        options = [min(options[0], max_iter), *options[1:]]
    return Request(
        *(device.type, dtype, size, batch, solver),
        *(tuple(options), precision, symmetric, gpu_of(device), is_capturing(device)),
    )


def _forward(
    backend: str,
    weight: Tensor,
    injection: Tensor,
    start: Tensor | None,
    activation: str,
    solver: str,
    solver_options: Sequence[float],
    tol: float,
    max_iter: int,
    precision: str = "auto",
    slope: bool = False,
    symmetric: bool = False,
) -> affine.Outputs:
    dtype = affine.working_dtype(weight, injection, *([] if start is None else [start]))
    request = _request(injection, dtype, solver, solver_options, max_iter, precision, symmetric)
    arguments = (weight, injection, start, activation, solver, solver_options, tol, max_iter)
    return _solve("solve_affine", backend, request, (*arguments, precision, slope, symmetric))


def _adjoint(
    backend: str,
    weight: Tensor,
    slope: Tensor,
    grad: Tensor,
    solver: str,
    solver_options: Sequence[float],
    tol: float,
    max_iter: int,
    precision: str = "auto",
    symmetric: bool = False,
    packed: Tensor | None = None,
) -> affine.Outputs:
    dtype = affine.working_dtype(weight, slope, grad)
    request = _request(grad, dtype, solver, solver_options, max_iter, precision, symmetric)
    arguments = (weight, slope, grad, solver, solver_options, tol, max_iter, precision)
    return _solve("solve_affine_adjoint", backend, request, (*arguments, symmetric, packed))


for _name, _entry in (("solve_affine", _forward), ("solve_affine_adjoint", _adjoint)):
    torch.library.impl(f"fastdeq::{_name}", "CUDA")(functools.partial(_entry, "auto"))
    for _backend in ("triton", "cuda"):
        torch.library.impl(f"fastdeq::{_name}_{_backend}", "CompositeExplicitAutograd")(
            functools.partial(_entry, _backend)
        )


def check_backend(
    what: str,
    backend: str,
    solver: Solver,
    max_iter: int,
    precision: str,
    symmetric: bool,
    rows: Tensor,
    *others: Tensor,
) -> None:
    """Raises ops.BackendError unless the solve ``what`` of ``rows`` ``(B, d)`` can be had: a
    forward pass is to say that its gradient cannot."""
    insists = backend in ("triton", "cuda") or (precision == "mixed" and rows.is_cuda)
    if not insists or rows.numel() == 0 or torch.compiler.is_compiling():
        return
    dtype = affine.working_dtype(rows, *others)
    request = _request(rows, dtype, *affine.encode(solver), max_iter, precision, symmetric)
    if choose(request, backend) is None:
        raise _refusal(request, backend, what)


def check_precision(precision: str, backend: str, weight: Tensor, *solvers: Solver) -> None:
    """Raises ops.BackendError for ``precision="mixed"`` where that cannot be had."""
    if precision != "mixed":
        return
    reason = ops.why_no_ramp(backend, weight.device.type)
    if not reason and weight.dtype == torch.float64:
        reason = "a float64 cell is solved in float64"
    if weight.device.type == "cpu" and backend != "triton":
        missing = [repr(s.name) for s in solvers if s.name not in CPP_SOLVERS]
        if not reason and missing:
            reason = f"the C++ engine has no solver {', '.join(missing)}"
    if reason:
        raise ops.BackendError(
            f"precision='mixed' is not available: {reason}. precision='auto' uses it where it can "
            "be had and is faster."
        )


def chosen(
    name: str, backend: str, device: torch.device, solver: Solver
) -> Callable[..., affine.Outputs]:
    """The whole solve ``name`` in the form that ``backend`` names, for tensors on ``device``.

    Raises:
        ops.BackendError: an explicit backend that cannot serve this device or this solver.
    """
    anderson_mix = ops.implementation(backend, device)
    if backend == "cpp" and solver.name not in CPP_SOLVERS:
        raise ops.BackendError(
            f"backend='cpp' has no solver {solver.name!r} for affine cells; it has "
            f"{', '.join(map(repr, CPP_SOLVERS))}. backend='auto' serves them all."
        )
    if backend == "reference":
        return functools.partial(affine.BODIES[name], anderson_mix=anderson_mix)
    suffix = {"triton": "_triton", "cuda": "_cuda"}.get(backend, "")
    return getattr(torch.ops.fastdeq, name + suffix)  # type: ignore[no-any-return]
