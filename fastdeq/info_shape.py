"""What ``python -m fastdeq info --size`` prints: which engine solves a cell of that shape, and why
no other does.
"""

from __future__ import annotations

from typing import Any

import torch

from . import ops
from .affine import encode
from .cells import AffineCell
from .engine_table import CPP_SOLVERS, ENGINES, Request
from .engine_table import choose as choose_engine
from .gpus import KNOWN_GPUS, Gpu, gpu_of
from .options import Options
from .solvers import choose


def _gpu(device: str, capability: tuple[int, int] | None) -> tuple[Gpu | None, str]:
    """The device that is asked about, and a note on it."""
    if device == "cpu":
        return None, ""
    if capability is None and torch.cuda.is_available():
        found = gpu_of(torch.device("cuda"))
        return found, f" ({torch.cuda.get_device_name()})"
    if capability is None:
        capability = (9, 0)
    if capability not in KNOWN_GPUS:
        known = ", ".join(f"{major}.{minor}" for major, minor in KNOWN_GPUS)
        raise ValueError(
            f"compute capability {capability[0]}.{capability[1]} is not at hand; those known "
            f"without a device: {known}."
        )
    return KNOWN_GPUS[capability], f" (assumed: compute capability {capability[0]}.{capability[1]})"


def _on_cpu(request: Request) -> list[str]:
    if request.precision == "mixed":
        why = ops.why_no_ramp("auto", "cpu")
        if why or request.dtype == torch.float64 or request.solver not in CPP_SOLVERS:
            return ["nothing: precision='mixed' raises"]
    if ops.serving("cpu") == "cpp" and request.solver in CPP_SOLVERS:
        return ["the C++ engine"]
    why = ops.why_unavailable("cpp", "cpu") or f"the C++ engine has no solver {request.solver!r}"
    return ["the reference", f"  not cpp: {why}"]


def _on_gpu(request: Request) -> list[str]:
    engine = choose_engine(request)
    without = "the reference"
    if request.precision == "mixed":
        without = "nothing: precision='mixed' raises"
    lines = [without if engine is None else f'{engine.name} (backend="{engine.backend}")']
    for other in ENGINES:
        if engine is not None and other.name == engine.name:
            continue
        why = other.why_not(request) or (
            "it can, and comes later in the order of preference"
            if other.preferred(request)
            else "it can, and others are preferred for so large a product"
        )
        lines.append(f"  not {other.name}: {why}")
    return lines


def report_shape(
    size: int,
    batch: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
    capability: tuple[int, int] | None = None,
    weight: str = "dense",
    activation: str = "tanh",
    scale: float = 0.9,
    precision: str = "auto",
    **solvers: Any,
) -> str:
    """The choice for the forward and the adjoint solve of ``AffineCell(..., size)`` on ``batch``
    samples; ``solvers`` are "solver" and "adjoint" of a layer.

    Raises:
        ValueError: options that do not exist, or a capability of which nothing is known.
    """
    options = Options.checked("info", {}, precision=precision, **solvers)
    cell = AffineCell(1, min(size, 2), activation=activation, weight=weight, scale=scale)
    gpu, note = _gpu(device, capability)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    lines = [
        f"AffineCell(..., {size}, activation={activation!r}, weight={weight!r}, scale={scale:g}), "
        f"{batch} samples, {str(dtype).removeprefix('torch.')}, on {device}{note}"
    ]
    for what, given in (("forward", options.solver), ("adjoint", options.adjoint)):
        solver = choose(given, cell.structure(), options.tol, adjoint=what == "adjoint")
        name, numbers = encode(solver)
        request = Request(
            *(device, working, size, batch, name, tuple(numbers), precision),
            *(weight == "symmetric", gpu),
        )
        first, *others = _on_cpu(request) if device == "cpu" else _on_gpu(request)
        lines += ["", f"{what}: {solver}", f"  {first}", *others]
    return "\n".join(lines)
