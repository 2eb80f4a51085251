"""What ``python -m fastdeq info`` prints: what this build has, and the engine for a shape."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

import torch

from ..solvers.solve_options import SolveOptions
from . import extension
from .choose import ENGINES, Request, choose_engine, triton_missing, why_not_device
from .device import KNOWN_GPUS, Gpu, gpu_of


def _extension() -> str:
    if extension.module is None:
        return f"missing: {extension.why_missing}"
    built = extension.build_info
    text = f"loaded; {built['compiler']}, built against torch {built['torch']}"
    running = torch.__version__.split("+")[0]
    if built["torch"].split("+")[0] != running:
        text += f" but running {running}: reinstall fastdeq"
    return text


def _cuda_sources() -> str:
    record = extension.build_record
    if extension.has_cuda:
        architectures = record.get("architectures")
        return f"compiled in, for {architectures}" if architectures else "compiled in"
    if extension.module is None:
        return "missing with the extension"
    return f"left out: {record.get('why_no_cuda') or 'why was not recorded'}"


def _triton() -> str:
    missing = triton_missing()
    return f"missing: {missing}" if missing else importlib.metadata.version("triton")


def _gpu() -> str:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    return "none: torch finds no CUDA device"


def _backend(name: str) -> str:
    device = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda"}.get(name, "cpu")
    reason = why_not_device(name, device)
    if not reason and device == "cuda" and not torch.cuda.is_available():
        reason = "no CUDA device here"
    return f"unavailable: {reason}" if reason else f"available for {device} tensors"


def report(version: str) -> str:
    """The report on the machine, one fact per line; ``version`` is fastdeq's."""
    cpu = "reference" if why_not_device("cpp", "cpu") else "cpp"
    cuda = "reference" if triton_missing() else "triton"
    rows = {
        "fastdeq": version,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "extension": _extension(),
        "CPU engine": extension.build_info.get("engine", "missing with the extension"),
        "its threads": extension.build_info.get("threads", "missing with the extension"),
        "CUDA sources": _cuda_sources(),
        "Triton": _triton(),
        "compiler": os.environ.get("CXX") or shutil.which("c++") or "none found on PATH",
        "nvcc": shutil.which("nvcc") or "none found on PATH",
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "GPU": _gpu(),
    }
    rows |= {f'backend="{name}"': _backend(name) for name in ("cpp", "triton", "cuda")}
    operators = {
        "anderson_mix": (cpu, cuda),
        "gmres_step": (cpu, "reference"),
        "solve_affine": (cpu, "by shape: see info --size"),
        "solve_affine_adjoint": (cpu, "by shape: see info --size"),
        "symmetric_part": (cpu, "reference"),
    }
    lines = [f"{key:18} {value}" for key, value in rows.items()]
    lines += ["", 'with backend="auto":', f"{'operator':22} {'on cpu':12} on cuda"]
    lines += [f"{name:22} {on[0]:12} {on[1]}" for name, on in operators.items()]
    return "\n".join(lines)


def gpu_asked_about(device: str, capability: tuple[int, int] | None) -> tuple[Gpu | None, str]:
    """The device of a question, and a note on it.

    Raises:
        ValueError: a capability of which nothing is known.
    """
    if device == "cpu":
        return None, ""
    if capability is None and torch.cuda.is_available():
        return gpu_of(torch.device("cuda")), f" ({torch.cuda.get_device_name()})"
    if capability is None:
        capability = (9, 0)
    if capability not in KNOWN_GPUS:
        known = ", ".join(f"{major}.{minor}" for major, minor in KNOWN_GPUS)
        raise ValueError(
            f"compute capability {capability[0]}.{capability[1]} is not at hand; those known "
            f"without a device: {known}."
        )
    return KNOWN_GPUS[capability], f" (assumed: compute capability {capability[0]}.{capability[1]})"


def engines_for(
    device: str, size: int, batch: int, dtype: torch.dtype, options: SolveOptions, gpu: Gpu | None
) -> list[str]:
    """The engine of one solve, and a line for every other one that says why it is not taken."""
    working = torch.float64 if dtype == torch.float64 else torch.float32
    request = Request(device, working, size, batch, options, gpu=gpu)
    chosen = choose_engine(request).engine
    lines = [chosen or "nothing: precision='mixed' raises"]
    for engine in ENGINES:
        if engine.name == chosen:
            lines[0] += f' (backend="{engine.backend}")'
            continue
        why = engine.why_not(request) or (
            "it can, and comes later in the order of preference"
            if engine.preferred(request)
            else "it can, and others are preferred for this shape"
        )
        lines.append(f"  not {engine.name}: {why}")
    return lines
