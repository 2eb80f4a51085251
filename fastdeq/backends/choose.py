"""The choice of an engine for the solve of an affine cell: one table, one function.

    engine      backend    device
    cpp         cpp        CPU    csrc/cpu: a whole solve per call, worked off by threads
    persistent  cuda       CUDA   csrc/cuda: W stays on the chip, one launch per solve
    whole       triton     CUDA   kernels/whole: small d, one launch per solve
    steps       triton     CUDA   kernels/steps: any size, every solver, low-precision products
    reference   reference  any    ops/: plain PyTorch, and what the others are tested against

docs/gpu.md says what the order rests on.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch

from ..errors import BackendError, check_choice
from ..solvers.solve_options import SolveOptions
from . import extension
from .device import Gpu

Backend = Literal["auto", "reference", "cpp", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
CPP_SOLVERS = ("picard", "neumann", "anderson", "heavy_ball", "energy", "minres")
CUDA_SOLVERS = ("picard", "neumann", "anderson", "heavy_ball")

# Multiply-adds of one product, d * d * B, up to which the persistent engine is preferred. Beyond,
# low-precision products on the matrix units gain more than the launches cost: by datasheet rates of
# an H100 at two thirds of their peak, not by measurement.
PERSISTENT_WORK = 2e8
_LEAST_CAPABILITY = (8, 0)
_NO_LOW_PRECISION = "it has no low-precision products"


class Request(NamedTuple):
    """A solve, as far as the choice depends on it; ``dtype`` is what it runs in."""

    device_type: str
    dtype: torch.dtype
    size: int
    batch: int
    options: SolveOptions
    backend: str = "auto"
    gpu: Gpu | None = None  # None on a CPU


class Engine(NamedTuple):
    """One way to run a solve. ``why_not`` says why it cannot, and is empty where it can."""

    name: str
    backend: str
    why_not: Callable[[Request], str]
    preferred: Callable[[Request], bool] = lambda request: True


class Choice(NamedTuple):
    """An engine's name; or None, and every engine's reason."""

    engine: str | None
    reasons: dict[str, str]


def triton_missing() -> str:
    """Why the Triton kernels cannot be imported; empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (`pip install triton`, Linux only)"
    if importlib.util.find_spec("fastdeq.kernels") is None:
        return "the package fastdeq.kernels is not installed (`pip install -e .`)"
    return ""


def why_not_device(backend: str, device_type: str) -> str:
    """Why ``backend`` has nothing for tensors on ``device_type``; empty when it has."""
    home = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda"}.get(backend, device_type)
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != home and not interpreted:
        name = "CUDA" if home == "cuda" else "CPU"
        note = " (TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
        needs = f"it works on {name} tensors, and these are on {device_type}"
        return needs + (note if backend == "triton" else "")
    if backend == "cpp":
        return f"the extension is missing: {extension.why_missing}" if extension.why_missing else ""
    if backend == "cuda":
        return "" if extension.has_cuda else extension.why_no_cuda()
    return triton_missing() if backend == "triton" else ""


def _warn_if_slow(backend: str, device_type: str) -> None:
    if backend == "auto" and device_type == "cpu":
        extension.warn_if_missing()


def check_device(backend: str, device_type: str) -> None:
    """Raises ValueError for an unknown backend, BackendError for one without anything for tensors
    on ``device_type``; warns where the extension is missed."""
    check_choice(backend, BACKENDS, "backend")
    _warn_if_slow(backend, device_type)
    reason = why_not_device(backend, device_type)
    if reason:
        usable = [repr(b) for b in BACKENDS if not why_not_device(b, device_type)]
        raise BackendError(
            f"backend={backend!r} is not available: {reason}. Available here: {', '.join(usable)}."
        )


def _no_solver(request: Request, solvers: tuple[str, ...]) -> str:
    if request.options.solver in solvers:
        return request.options.why_plain_pytorch
    names = ", ".join(map(repr, solvers))
    return f"it has no solver {request.options.solver!r}, only {names}"


def _why_not_cpp(request: Request) -> str:
    reason = why_not_device("cpp", request.device_type) or _no_solver(request, CPP_SOLVERS)
    if reason or request.options.precision != "mixed":
        return reason
    if request.dtype == torch.float64:
        return "a float64 cell is solved in float64"
    return (
        "" if extension.has_low_precision else "this processor or build lacks AVX-512 BF16 or VNNI"
    )


def _why_not_persistent(request: Request) -> str:
    reason = why_not_device("cuda", request.device_type) or _no_solver(request, CUDA_SOLVERS)
    if reason:
        return reason
    if request.options.precision == "mixed":
        return _NO_LOW_PRECISION
    assert request.gpu is not None
    assert extension.module is not None
    if request.gpu.capability < _LEAST_CAPABILITY:
        major, minor = request.gpu.capability
        return f"it needs compute capability 8.0, this device has {major}.{minor}"
    found: str = extension.module.why_not_persistent(
        size=request.size,
        batch=request.batch,
        element_bytes=request.dtype.itemsize,
        window=request.options.most_differences,
        multiprocessors=request.gpu.multiprocessors,
        shared_bytes=request.gpu.shared_memory,
    )
    return found


def _why_not_triton(request: Request) -> str:
    if request.device_type != "cuda" and request.backend != "triton":
        return "on the CPU it is for tests alone"  # in the interpreter, where asked for by name
    if request.options.min_iter:
        return "it knows no min_iter"
    if reason := request.options.why_plain_pytorch:
        return reason
    if request.options.first_window:
        return "its history does not grow, as first_window says"
    return why_not_device("triton", request.device_type)


def _why_not_whole(request: Request) -> str:
    reason = _why_not_triton(request)
    if reason or request.options.precision == "mixed":
        return reason or _NO_LOW_PRECISION
    from ..kernels.whole.engine import why_not  # slow to import: only when asked

    shared_memory = None if request.gpu is None else request.gpu.shared_memory
    found: str = why_not(request.options, request.size, request.dtype, shared_memory)
    return found


def _why_not_steps(request: Request) -> str:
    reason = _why_not_triton(request)
    if reason:
        return reason
    from ..kernels.steps.engine import why_not

    found: str = why_not(request.options, request.dtype)
    return found


def _why_not_reference(request: Request) -> str:
    return _NO_LOW_PRECISION if request.options.precision == "mixed" else ""


ENGINES = (
    Engine("cpp", "cpp", _why_not_cpp),
    Engine(
        "persistent",
        "cuda",
        _why_not_persistent,
        lambda request: request.size**2 * request.batch <= PERSISTENT_WORK,
    ),
    Engine("whole", "triton", _why_not_whole),
    Engine("steps", "triton", _why_not_steps),
    Engine("reference", "reference", _why_not_reference, lambda request: False),
)


ENGINE_NAMES = tuple(engine.name for engine in ENGINES)


def choose_engine(request: Request) -> Choice:
    """The first engine of the requested backend that can run the solve and is preferred for it, or
    else the first that can.

    An engine is asked only if none before it is taken: importing triton is slow.
    """
    able = None
    reasons = {}
    for engine in ENGINES:
        if request.backend not in ("auto", engine.backend):
            continue
        reason = engine.why_not(request)
        if reason:
            reasons[engine.name] = reason
        elif engine.preferred(request):
            return Choice(engine.name, {})
        else:
            able = able or engine.name
    return Choice(able, {} if able else reasons)


def require_engine(request: Request, what: str = "solve") -> str:
    """The name of the engine for ``request``; warns where the extension is missed.

    Raises:
        BackendError: there is none; the message has every engine's reason, and what there is.
    """
    engine, reasons = choose_engine(request)
    if engine is not None:
        _warn_if_slow(request.backend, request.device_type)
        return engine
    mixed = request.options.precision == "mixed"
    asked = [f"backend={request.backend!r}"] if request.backend != "auto" else []
    asked += ["precision='mixed'"] if mixed else []
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    usable = [b for b in BACKENDS if choose_engine(request._replace(backend=b)).engine]
    hint = f"Available here: {', '.join(map(repr, usable))}."
    if not usable:
        hint = "precision='auto' uses low-precision products where they can be had and are faster."
    shape = f"size {request.size}"
    if request.device_type == "cuda":  # on a CPU nothing depends on the batch
        shape += f", up to {request.batch} samples"
    solve = f"{what} ({request.options.solver}, {request.dtype}, {shape})"
    raise BackendError(
        f"{' with '.join(asked)} is not available for this {solve} on {request.device_type}: "
        f"{told}. {hint}"
    )
