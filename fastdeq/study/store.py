"""Where a study keeps its runs: one JSON file each, written atomically, and tables of them."""

from __future__ import annotations

import json
import math
import os
import platform
import uuid
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

METADATA_KEY = b"fastdeq.study"


class Store:
    """A folder: ``runs/`` and ``initial/`` with a file per finished run, ``study.json``,
    ``results.parquet`` and ``initial.parquet``.

    A run is there as a whole or not at all, whenever the study is interrupted and also where two
    studies write to one folder.

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
        _write_text(self.folder / part / f"{key}.json", json.dumps(row))

    def check_data(self, name: str, fingerprint: str) -> None:
        """Remembers what data the runs of a task are on.

        Raises:
            ValueError: the folder holds runs on other data.
        """
        path = self.folder / f"{name}.sha256"
        known = path.read_text() if path.exists() else fingerprint
        if known != fingerprint:
            raise ValueError(
                f"{self.folder} holds runs on other data for the task {name!r}: choose another "
                "folder for the study."
            )
        if not path.exists():
            _write_text(path, fingerprint)

    def table(self, part: str, keys: Iterable[str]) -> pd.DataFrame:
        """The rows of these runs, those that are there, in this order."""
        rows = (self._row(part, key) for key in keys)
        return pd.DataFrame([row for row in rows if row is not None])

    def write_tables(
        self, settings: dict[str, Any], training: pd.DataFrame, initial: pd.DataFrame
    ) -> None:
        """``results.parquet`` and ``initial.parquet``, whose schemas carry settings and machine as
        JSON under ``fastdeq.study``; and the same alone in ``study.json``.

        Raises:
            OSError: the folder cannot be written to, or the disk is full; what was there stays.
        """
        about = json.dumps({"settings": _strict(settings), "machine": machine()}, indent=1)
        _write_text(self.folder / "study.json", about)
        for name, table in (("results", training), ("initial", initial)):
            arrow = pa.Table.from_pandas(table, preserve_index=False)
            arrow = arrow.replace_schema_metadata(
                {**(arrow.schema.metadata or {}), METADATA_KEY: about.encode()}
            )
            _write(self.folder / f"{name}.parquet", lambda file, t=arrow: pq.write_table(t, file))

    def _row(self, part: str, key: str) -> dict[str, Any] | None:
        """The row of a run; None where there is none, or a damaged file: the run is repeated."""
        try:
            row = json.loads((self.folder / part / f"{key}.json").read_bytes())
        except (FileNotFoundError, ValueError):  # also bytes that are no UTF-8
            return None
        return row if isinstance(row, dict) and row.get("key") == key and "error" in row else None


def _write_text(path: Path, text: str) -> None:
    _write(path, lambda file: file.write(text.encode()))


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """The file has its old content or the new, also after a power failure."""
    # A name of its own for each writer; unlike tempfile, open() heeds the umask.
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _strict(value: Any) -> Any:
    """Settings as strict JSON, which knows no infinity: it becomes a string."""
    if isinstance(value, dict):
        return {name: _strict(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
