"""The initialisation study: weight families and scales, on real data. Needs ``fastdeq[study]``."""

from __future__ import annotations

import importlib.util

_NEEDED = {
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "joblib": "joblib",
    "pandas": "pandas",
    "pyarrow": "pyarrow",
    "jsonargparse": "jsonargparse",
    "jinja2": "Jinja2",
}
_missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
if _missing:
    raise ImportError(
        f"fastdeq.study needs {', '.join(_missing)}, not installed here: pip install fastdeq[study]"
    )

from .classifier import DEQClassifier  # noqa: E402
from .config import Config  # noqa: E402
from .data import Dataset, digits, mnist, read_idx  # noqa: E402
from .ensemble import Ensemble, measure  # noqa: E402
from .plan import Characters, Images, Initial, Study, quick  # noqa: E402
from .report import figure, table  # noqa: E402
from .text import characters  # noqa: E402
from .training import Result, grid, sweep, train  # noqa: E402
from .transformer import CharacterTransformer  # noqa: E402

__all__ = [
    "CharacterTransformer",
    "Characters",
    "Config",
    "DEQClassifier",
    "Dataset",
    "Ensemble",
    "Images",
    "Initial",
    "Result",
    "Study",
    "characters",
    "digits",
    "figure",
    "grid",
    "measure",
    "mnist",
    "quick",
    "read_idx",
    "sweep",
    "table",
    "train",
]
