"""Loads the compiled extension, and remembers why when it is not there."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

_BUILD_RECORD = Path(__file__).parents[1] / "_build.json"


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastdeq._C"), ""
    except ModuleNotFoundError as error:
        if error.name != "fastdeq._C":
            return None, f"it failed to load: {error}"
    except ImportError as error:
        return None, f"it failed to load: {error}"
    if _BUILD_RECORD.is_file():
        return None, json.loads(_BUILD_RECORD.read_text())["reason"] or (
            f"the source folder {_BUILD_RECORD.parent} was imported, which has none: leave that "
            "folder, or install with `pip install -e . --no-build-isolation`"
        )
    return None, (
        f"there is none in {_BUILD_RECORD.parent}: run `pip install -e . --no-build-isolation`, or "
        "leave this folder if it hides an installed fastdeq"
    )


module, why_missing = _load()
build_info: dict[str, str] = module.build_info() if module else {}
has_cuda: bool = build_info.get("cuda", "") == "yes"
#: Whether the CPU engine has 8-bit and bfloat16 products here.
has_low_precision: bool = build_info.get("low_precision", "") == "yes"
