"""Examples as processes, as a user runs them, and as modules, for tests of their parts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from paths import ROOT

EXAMPLES = ROOT / "examples"


def run_example(
    name: str, *options: str, cwd: Path, launch: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """Runs it with those options, by the modules and options ``launch`` of Python."""
    # One thread: two that spin at barriers take many times as long where cores are shared.
    return subprocess.run(
        [sys.executable, *launch, str(EXAMPLES / name), *options],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def import_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
