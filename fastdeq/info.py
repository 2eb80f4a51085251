"""What ``python -m fastdeq info`` prints: which form serves what, what is missing, and why."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil

import torch

from . import __version__, extension, ops


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
    if extension.has_cuda:
        return "compiled in"
    if extension.module is None:
        return "missing with the extension"
    if torch.version.cuda is None:
        return "left out: this torch is built without CUDA"
    return "left out: nvcc was not found when fastdeq was installed"


def _triton() -> str:
    missing = ops.triton_missing()
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
    reason = ops.why_unavailable(name, device)
    if not reason and device == "cuda" and not torch.cuda.is_available():
        reason = "no CUDA device here"
    return f"unavailable: {reason}" if reason else f"available for {device} tensors"


def report() -> str:
    """The whole report, one fact per line."""
    rows = {
        "fastdeq": __version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "extension": _extension(),
        "CPU engine": extension.build_info.get("engine", "missing with the extension"),
        "its threads": extension.build_info.get("threads", "missing with the extension"),
        "CUDA sources": _cuda_sources(),
        "Triton": _triton(),
        "compiler": shutil.which("c++") or "none found on PATH",
        "nvcc": shutil.which("nvcc") or "none found on PATH",
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "GPU": _gpu(),
    }
    rows |= {f'backend="{name}"': _backend(name) for name in ("cpp", "triton", "cuda")}
    solves = {"cpu": ops.serving("cpu"), "cuda": "by shape: see info --size"}
    serving = {
        "anderson_mix": {device: ops.serving(device) for device in ("cpu", "cuda")},
        "solve_affine": solves,
        "solve_affine_adjoint": solves,
        "symmetric_part": solves,
    }
    lines = [f"{key:18} {value}" for key, value in rows.items()]
    lines += ["", 'with backend="auto":', f"{'operator':22} {'on cpu':12} on cuda"]
    lines += [f"{name:22} {at['cpu']:12} {at['cuda']}" for name, at in serving.items()]
    return "\n".join(lines)
