"""Files of a study: whole or not there, readable by others, and not trusted blindly."""

from __future__ import annotations

import json
import math
import os
import stat

import pandas as pd
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("jsonargparse")

from fastdeq.study import store as module
from fastdeq.study.store import Store

ROW = {"key": "k", "error": "", "loss": math.nan}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_allows(tmp_path, umask, mode):
    previous = os.umask(umask)
    try:
        store = Store(tmp_path)
        store.put("runs", "k", ROW)
        store.write_tables({}, pd.DataFrame([ROW]), pd.DataFrame())
    finally:
        os.umask(previous)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.name for p in files} == {"k.json", "study.json", "results.parquet", "initial.parquet"}
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {mode}


@pytest.mark.parametrize(
    "content", [b"", b'{"key": "k", "er', b"\0" * 40, b"\xff\xfe\x00", b"null", b"[1]", b"{}", b"3",
                b'{"key": "other", "error": ""}'],
    ids=range(9),
)  # fmt: skip
def test_a_damaged_file_is_a_run_that_is_missing(tmp_path, content):
    store = Store(tmp_path)
    (tmp_path / "runs" / "k.json").write_bytes(content)
    assert not store.has("runs", "k")
    assert store.table("runs", ["k"]).empty
    store.put("runs", "k", ROW)
    assert store.has("runs", "k")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.put("runs", "k", ROW)
    store.write_tables({"a": 1}, pd.DataFrame([ROW]), pd.DataFrame())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.put("runs", "k", {**ROW, "loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        store.write_tables({"a": 2}, pd.DataFrame([ROW]), pd.DataFrame())
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_two_writers_do_not_share_an_unfinished_file(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(module.os, "replace", lambda a, b: names.append(a))
    for _ in range(2):
        Store(tmp_path).put("runs", "k", ROW)
    assert len(set(names)) == 2


def test_settings_are_strict_json(tmp_path):
    Store(tmp_path).write_tables({"a": {"b": math.inf, "c": [0.5]}}, pd.DataFrame(), pd.DataFrame())

    def refuse(name):
        raise AssertionError(name)

    about = json.loads((tmp_path / "study.json").read_text(), parse_constant=refuse)
    assert about["settings"] == {"a": {"b": "inf", "c": [0.5]}}


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        Store(tmp_path / "file")
