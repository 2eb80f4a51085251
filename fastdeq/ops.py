"""The operators: schemas, fakes, and which implementation serves which device.

The PyTorch dispatcher is the table. Each operator is defined once, in namespace ``fastdeq``; the
plain PyTorch form is registered for every device, and a faster form takes over where it exists:
C++ for CPU tensors, CUDA C++ or Triton for CUDA tensors. A form that does not exist *is* the
reference. ``implementation`` serves an explicit choice, or raises and says why it cannot.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import extension, reference
from .choices import check_choice

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot run here; the message says why and what can."""


SCHEMAS = {
    "anderson_mix": (
        "(Tensor f_history, Tensor g_history, Tensor(a!) gram, Tensor count, int slot, "
        "float damping, float regularization, float rank_tolerance, float max_weight) "
        "-> (Tensor z, Tensor dropped, Tensor rejected)"
    ),
    "symmetric_part": "(Tensor a) -> Tensor",
}
# Other forms of the two solves, by the end of their name: the plain PyTorch one, those of a backend
# asked for, and the engines of csrc/cuda/.
FORMS = ("_reference", "_triton", "_cuda", "_persistent")
# The two solves return value (B, d), status (B,) int8, iterations (B,) int32, residual (B,) and
# rejects (B, number of reasons) int32; the forward one also phi' at the value, empty unless asked
# for, and, of a symmetric weight, bytes that spare its adjoint preparing it again. Their bodies are
# in affine.py, as "_reference" as well: a faster form leaves to that what it does not serve.
for _suffix in ("", *FORMS):
    SCHEMAS["solve_affine" + _suffix] = (
        "(Tensor weight, Tensor injection, Tensor? start, str activation, str solver, "
        "float[] solver_options, float tol, int max_iter, str precision='auto', bool slope=False, "
        "bool symmetric=False) -> (Tensor value, Tensor status, Tensor iterations, "
        "Tensor residual, Tensor rejects, Tensor value_slope, Tensor packed)"
    )
    SCHEMAS["solve_affine_adjoint" + _suffix] = (
        "(Tensor weight, Tensor slope, Tensor grad, str solver, "
        "float[] solver_options, float tol, int max_iter, str precision='auto', "
        "bool symmetric=False, Tensor? packed=None) "
        "-> (Tensor value, Tensor status, Tensor iterations, Tensor residual, Tensor rejects)"
    )

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"fastdeq::{_name}", _schema)

torch.library.impl("fastdeq::anderson_mix", "CompositeExplicitAutograd")(reference.anderson_mix)


torch.library.impl("fastdeq::symmetric_part", "CompositeExplicitAutograd")(reference.symmetric_part)


@torch.library.register_fake("fastdeq::symmetric_part")
def _symmetric_part_fake(a: Tensor) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


torch.library.register_autograd(
    "fastdeq::symmetric_part", lambda ctx, grad: torch.ops.fastdeq.symmetric_part(grad)
)


def symmetric_part(a: Tensor) -> Tensor:
    """``(A + A^T) / 2`` of a square matrix, exactly symmetric."""
    part: Tensor = torch.ops.fastdeq.symmetric_part(a)
    return part


@torch.library.register_fake("fastdeq::anderson_mix")
def _anderson_mix_fake(
    f_history: Tensor, g_history: Tensor, gram: Tensor, count: Tensor, *_: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _slots, size = f_history.shape
    return (
        f_history.new_empty(batch, size),
        count.new_empty(batch, dtype=torch.int32),
        count.new_empty(batch, dtype=torch.bool),
    )


def triton_missing() -> str:
    """Why the Triton kernels cannot be imported; empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (`pip install triton`, Linux only)"
    if importlib.util.find_spec("fastdeq.kernels") is None:
        return "the package fastdeq.kernels is not installed (`pip install -e .`)"
    return ""


def _triton_anderson_mix(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels.anderson_mix import anderson_mix  # importing triton is slow: only when used

    return anderson_mix(*args)  # type: ignore[no-any-return]


if not triton_missing():
    torch.library.impl("fastdeq::anderson_mix", "CUDA")(_triton_anderson_mix)

_ANDERSON_MIX: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "auto": torch.ops.fastdeq.anderson_mix,
    "reference": reference.anderson_mix,
    "cpp": torch.ops.fastdeq.anderson_mix,  # the CPU key
    "cuda": torch.ops.fastdeq.anderson_mix,
    "triton": _triton_anderson_mix,
}


def why_unavailable(backend: str, device_type: str) -> str:
    """Why ``backend`` cannot serve tensors on ``device_type``; empty when it can."""
    if backend == "cpp":
        if device_type != "cpu":
            return f"it serves CPU tensors, and these are on {device_type}"
        return f"the extension is missing: {extension.why_missing}" if extension.why_missing else ""
    if backend == "cuda":
        if device_type != "cuda":
            return f"it serves CUDA tensors, and these are on {device_type}"
        return "" if extension.has_cuda else "the extension was built without CUDA sources"
    if backend == "triton":
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                f"it serves CUDA tensors, and these are on {device_type} "
                "(TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
            )
        return triton_missing()
    return ""


def why_no_ramp(backend: str, device_type: str) -> str:
    """Why there are no narrow products for tensors there; empty when there are."""
    if device_type == "cuda" or backend == "triton":
        able = ("cuda", "triton") if backend == "auto" else (backend,)
        if backend not in ("auto", "cuda", "triton"):
            return f"backend={backend!r} has no narrow products on {device_type}"
        missing = {b: why_unavailable(b, device_type) for b in able}
        return "" if "" in missing.values() else "; ".join(missing.values())
    if device_type != "cpu" or backend not in ("auto", "cpp"):
        return f"backend={backend!r} has no narrow products on {device_type}"
    if extension.why_missing:
        return f"the extension is missing: {extension.why_missing}"
    return "" if extension.has_ramp else "this processor or build lacks AVX-512 BF16 or VNNI"


def implementation(backend: str, device: torch.device) -> Callable[..., Any]:
    """The form of ``anderson_mix`` that ``backend`` names, for tensors on ``device``.

    Raises:
        ValueError: unknown backend. BackendError: a known one that cannot serve this device.
    """
    check_choice(backend, BACKENDS, "backend")
    reason = why_unavailable(backend, device.type)
    if reason:
        usable = [repr(b) for b in BACKENDS if not why_unavailable(b, device.type)]
        raise BackendError(
            f"backend={backend!r} is not available: {reason}. Available here: {', '.join(usable)}."
        )
    return _ANDERSON_MIX[backend]


def serving(device_type: str) -> str:
    """Which form of ``anderson_mix`` serves ``backend="auto"`` on a device type."""
    candidates = {"cpu": ("cpp",), "cuda": ("triton",)}.get(device_type, ())
    return next((b for b in candidates if not why_unavailable(b, device_type)), "reference")
