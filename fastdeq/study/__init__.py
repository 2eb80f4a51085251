"""The initialisation study: weight families and scales, on real data. Needs ``fastdeq[study]``."""

from __future__ import annotations

import importlib.util

_NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}
_missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
if _missing:
    raise ImportError(
        f"fastdeq.study needs {', '.join(_missing)}, not installed here: pip install fastdeq[study]"
    )

from .classifier import DEQClassifier  # noqa: E402
from .data import Dataset, digits, mnist, read_idx  # noqa: E402
from .report import figure, table  # noqa: E402
from .training import Config, Result, grid, sweep, train  # noqa: E402

__all__ = [
    "Config",
    "DEQClassifier",
    "Dataset",
    "Result",
    "digits",
    "figure",
    "grid",
    "mnist",
    "read_idx",
    "sweep",
    "table",
    "train",
]
