"""Which machine and which versions a measurement on a GPU was made with."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from record import cpu_model, version

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("fastdeq", "torch", "triton", "torchdeq", "numpy")
_QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,mig.mode.current"


def describe(device: torch.device) -> dict[str, Any]:
    """For the results; ``device`` names itself where it is a GPU."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "device": cpu_model(),
        "cpu": cpu_model(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "smi": _smi(),
        }
    return facts


def commit() -> str | None:
    """The commit of the checkout, with a plus where it was changed since; None where unknown."""
    head = _output("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    if head is None:
        return None
    changed = _output("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "")


def _smi() -> dict[str, str]:
    answer = _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0")
    return {} if answer is None else dict(zip(_QUERY.split(","), answer.split(", "), strict=False))


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()
