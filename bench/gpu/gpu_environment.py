"""The environment of ``make gpu``: ``.venv-gpu``, which sees all that one interpreter sees.

Its torch is to be the one that is there, and nothing may be fetched. With ``venv
--system-site-packages`` one sees the packages of the *base* interpreter; where the interpreter is
that of a virtual environment itself, its torch is elsewhere. So a ``.pth`` file names the folders
that it imports from. pip and setuptools are found the same way, and need not be installed anew.

Needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

# Run by the interpreter that was named.
_PROBE = """
import importlib.metadata, importlib.util, json, sys
found = {name: importlib.util.find_spec(name) is not None for name in sys.argv[1:]}
found["executable"], found["version"] = sys.executable, list(sys.version_info[:3])
packages = ("site-packages", "dist-packages")
found["folders"] = [path for path in sys.path if path.rstrip("/").endswith(packages)]
found["why_no_gpu"] = "no torch there"
if found["torch"]:
    import torch
    found["torch_version"], found["why_no_gpu"] = torch.__version__, ""
    if torch.version.cuda is None:
        found["why_no_gpu"] = f"torch {torch.__version__} is built without CUDA"
    elif not torch.cuda.is_available():
        found["why_no_gpu"] = f"torch {torch.__version__} finds no CUDA device"
    else:
        found["device"] = torch.cuda.get_device_name()
        found["capability"] = list(torch.cuda.get_device_capability())
if found["setuptools"]:
    found["setuptools_version"] = importlib.metadata.version("setuptools")
print(json.dumps(found))
"""
_NEEDED = ("venv", "pip", "setuptools", "pytest", "torch")
_LEAST_PYTHON = [3, 10]
_LEAST_CAPABILITY = [8, 0]
_LEAST_SETUPTOOLS = 77  # as in pyproject.toml, which pip does not read without isolation
HOW = "Name the interpreter that has torch with make gpu PYTHON=/path/to/python."


class CannotError(Exception):
    """``make gpu`` cannot run here; the message says why and what to do."""


def probe(python: str) -> dict[str, Any]:
    """What ``python`` has.

    Raises:
        CannotError: it is no interpreter that runs.
    """
    if shutil.which(python) is None:
        raise CannotError(f"there is no interpreter {python!r}. {HOW}")
    command = [python, "-c", _PROBE, *_NEEDED]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        raise CannotError(f"{python} does not run: {' '.join(said)}. {HOW}") from error


def why_not(found: dict[str, Any]) -> str:
    """Why the interpreter of ``probe`` will not do; empty when it will. The GPU comes first."""
    name = found["executable"]
    if found["why_no_gpu"]:
        return f"{found['why_no_gpu']} ({name}); make gpu needs an NVIDIA GPU. {HOW}"
    capability = found.get("capability", _LEAST_CAPABILITY)
    if capability < _LEAST_CAPABILITY:
        has = ".".join(map(str, capability))
        return f"{found['device']} has compute capability {has}; make gpu needs 8.0"
    if found["version"] < _LEAST_PYTHON:
        return f"{name} is Python {'.'.join(map(str, found['version']))}; 3.10 is needed. {HOW}"
    missing = [module for module in _NEEDED if not found[module]]
    if missing:
        return (
            f"{name} has no {' and no '.join(missing)}, which building without a network needs. "
            f"Install them for it (on Debian and Ubuntu: python3-venv, python3-pip), or: {HOW}"
        )
    setuptools = found.get("setuptools_version", str(_LEAST_SETUPTOOLS))
    if int(setuptools.split(".")[0]) < _LEAST_SETUPTOOLS:
        return f"{name} has setuptools {setuptools}; {_LEAST_SETUPTOOLS} is needed. {HOW}"
    return ""


def create(found: dict[str, Any], folder: Path) -> Path:
    """Makes ``folder`` anew and returns its interpreter.

    Raises:
        CannotError: venv fails, with what it said.
    """
    command = [found["executable"], "-m", "venv", "--clear", "--without-pip"]
    command += ["--system-site-packages", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise CannotError(f"{found['executable']} -m venv fails: {said}")
    (folder / ".gitignore").write_text("*\n")
    (packages,) = folder.glob("lib/python*/site-packages")
    # After the folder's own packages, as every line of a .pth file.
    (packages / "parent.pth").write_text("\n".join(found["folders"]) + "\n")
    return folder / "bin" / "python"


def install_command(python: Path) -> list[str]:
    """Builds the extension against the torch that is there and installs fastdeq in place."""
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    return [str(python), "-m", "pip", "install", "--verbose", *options, "-e", "."]


def environment(**more: str) -> dict[str, str]:
    """For the programs that are run: not under Triton's interpreter, output as it comes."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONUNBUFFERED": "1", **more}
