"""The results as JSON: machine, versions, and of each race medians, ratios and residuals."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from report import Races

_PACKAGES = ("fastdeq", "torch", "torchdeq", "jax", "jaxlib", "jaxopt", "numpy", "pytest-benchmark")


def write_json(path: Path, races: Races, load_before: float | None) -> None:
    """Writes ``path`` and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "load_before": load_before,
        "load_after": load(),
        "races": [race_record(group, key, races[group, key]) for group, key in races],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def race_record(group: str, key: str, race: Any) -> dict[str, Any]:
    """What is written of a race."""
    contestants = {}
    for name, seconds in race.medians.items():
        contestants[name] = {
            "median_ms": seconds * 1e3,
            "ratio": race.ratio(name),
            "iterations": race.iterations[name],
            "products": race.products[name],
            **race.facts[name],
        }
    return {
        "group": group,
        "id": key,
        "problem": dataclasses.asdict(race.spec) | {"kind": race.spec.kind},
        "mode": race.mode,
        "rounds": race.rounds,
        "reference": race.reference,
        "contestants": contestants,
        "left_out": race.skipped,
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def load() -> float | None:
    """The one-minute load average."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
