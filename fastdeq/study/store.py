"""Where a study keeps its runs: one JSON file each, written atomically, and tables of them."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

METADATA_KEY = b"fastdeq.study"


class Store:
    """A folder: ``runs/`` and ``initial/`` with a file per finished run, ``study.json``,
    ``results.parquet`` and ``initial.parquet``.

    A run is there as a whole or not at all, whenever the study is interrupted.

    Raises:
        NotADirectoryError: the path is a file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        for part in ("runs", "initial"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)

    def has(self, part: str, key: str) -> bool:
        """Whether the run finished, without an exception."""
        row = self._row(part, key)
        return row is not None and not row["error"]

    def put(self, part: str, key: str, row: dict[str, Any]) -> None:
        self._write(self.folder / part / f"{key}.json", json.dumps(row))

    def table(self, part: str, keys: Iterable[str]) -> pd.DataFrame:
        """The rows of these runs, those that are there, in this order."""
        rows = (self._row(part, key) for key in keys)
        return pd.DataFrame([row for row in rows if row is not None])

    def write_tables(
        self, settings: dict[str, Any], training: pd.DataFrame, initial: pd.DataFrame
    ) -> None:
        """``results.parquet`` and ``initial.parquet``, whose schemas carry settings and machine as
        JSON under ``fastdeq.study``; and the same alone in ``study.json``."""
        about = json.dumps({"settings": settings, "machine": machine()}, indent=1)
        self._write(self.folder / "study.json", about)
        for name, table in (("results", training), ("initial", initial)):
            arrow = pa.Table.from_pandas(table, preserve_index=False)
            arrow = arrow.replace_schema_metadata(
                {**(arrow.schema.metadata or {}), METADATA_KEY: about.encode()}
            )
            path = self.folder / f"{name}.parquet"
            unfinished = path.with_suffix(".unfinished")
            pq.write_table(arrow, unfinished)
            os.replace(unfinished, path)

    def _row(self, part: str, key: str) -> dict[str, Any] | None:
        try:
            row: dict[str, Any] = json.loads((self.folder / part / f"{key}.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # a damaged file: the run is made again
            return None
        return row

    @staticmethod
    def _write(path: Path, text: str) -> None:
        """The file has its old content or the new, also after a power failure."""
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                os.unlink(file.name)
                raise
        os.replace(file.name, path)


def machine() -> dict[str, str]:
    """Versions, processor and time, for the records."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fastdeq": version("fastdeq"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
    }
