"""Loads the compiled extension; where it is not there, remembers why and says so once."""

from __future__ import annotations

import importlib
import json
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import ExtensionWarning, warn_caller

_PACKAGE = Path(__file__).resolve().parents[1]
_REINSTALL = "`pip install --no-build-isolation --no-deps --force-reinstall .` in a checkout"


def _read_record() -> dict[str, Any]:
    """What setup.py wrote: "reason" why nothing was built, whether that was "on_purpose", the
    "torch" that it was built against, "why_no_cuda", "architectures". Empty where it never ran."""
    path = _PACKAGE / "_build.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _hidden_installation() -> Path | None:
    """A fastdeq with an extension for this interpreter that the imported folder hides."""
    for distribution in distributions(name="fastdeq"):
        folder = Path(str(distribution.locate_file("fastdeq"))).resolve()
        built = any((folder / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)
        if built and folder != _PACKAGE:
            return folder
    return None


def _why_absent(record: dict[str, Any]) -> str:
    hidden = _hidden_installation()
    if hidden:
        return (
            f"the source folder {_PACKAGE} was imported, which has none and hides the fastdeq that "
            f"is installed in {hidden}: start Python in another folder"
        )
    if record.get("reason"):
        remedy = f". Name GCC or Clang in CXX, or install it, and reinstall fastdeq: {_REINSTALL}"
        return f"{record['reason']}{'' if record.get('on_purpose') else remedy}"
    return (
        f"there is none for this Python in {_PACKAGE}: run `pip install --no-build-isolation -e .` "
        "there, or leave the folder if it hides an installed fastdeq"
    )


def _why_unloadable(record: dict[str, Any], error: ImportError) -> str:
    built = record.get("torch", torch.__version__)
    other = f"; it was built against torch {built}, and this is {torch.__version__}"
    found = f"it failed to load: {error}{other if built != torch.__version__ else ''}"
    return f"{found}. Build it against this torch: {_REINSTALL}"


def _load(record: dict[str, Any]) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastdeq._C"), ""
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "fastdeq._C":
            return None, _why_absent(record)
        return None, _why_unloadable(record, error)


build_record = _read_record()
module, why_missing = _load(build_record)
build_info: dict[str, str] = module.build_info() if module else {}
has_cuda: bool = build_info.get("cuda", "") == "yes"
#: Whether the CPU engine has 8-bit and bfloat16 products here.
has_low_precision: bool = build_info.get("low_precision", "") == "yes"
_silent = module is not None
if build_record.get("on_purpose"):
    _silent |= why_missing == build_record["reason"]  # not for an installation that is hidden


def why_no_cuda() -> str:
    """Why there are no CUDA sources in the extension, or no extension."""
    if module is None:
        return f"the extension is missing: {why_missing}"
    reason = build_record.get("why_no_cuda")
    return "the extension was built without CUDA sources" + (f": {reason}" if reason else "")


def warn_if_missing() -> None:
    """Warns once in a process that solves on the CPU are slow, and what to do about it; not where
    FASTDEQ_NO_EXT left the extension out, and not while ``torch.compile`` traces."""
    global _silent
    if torch.compiler.is_compiling() or _silent:
        return
    warn_caller(
        "fastdeq solves on the CPU in plain PyTorch, which takes several times as long as its "
        f"compiled extension. The extension is missing: {why_missing}. `python -m fastdeq info` "
        "shows what is in use.",
        ExtensionWarning,
    )
    _silent = True  # not before: a warning that is turned into an error is raised by each solve
