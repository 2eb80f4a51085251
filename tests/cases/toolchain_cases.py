"""Programs that only answer, in place of compilers."""

from __future__ import annotations

from pathlib import Path


def program(path: Path, body: str) -> Path:
    """A shell script at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def toolkit(
    folder: Path,
    release: str = "13.0",
    headers: str = "include",
    nvcc: str = "echo release {release}, V{release}.88",
) -> str:
    """A folder with as much of a CUDA toolkit as is looked at."""
    program(folder / "bin" / "nvcc", nvcc.format(release=release))
    (folder / headers).mkdir(parents=True)
    (folder / headers / "cuda_runtime.h").touch()
    return str(folder)
