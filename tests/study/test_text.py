"""Text of the study: files that are held out, and stretches that a seed decides."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fastdeq.study import characters
from fastdeq.study.text import library


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A library of twenty files, each of one letter."""
    for i in range(20):
        (tmp_path / f"{i:02d}.py").write_text(chr(ord("a") + i) * 50)
    monkeypatch.setattr("fastdeq.study.text.sysconfig.get_paths", lambda: {"stdlib": tmp_path})
    library.cache_clear()
    yield tmp_path
    library.cache_clear()


def test_a_tenth_of_the_files_is_held_out_and_not_trained_on(folder):
    train, test = (set(part.unique().tolist()) for part in library(0))
    assert (len(train), len(test)) == (18, 2)
    assert not train & test


def test_the_seed_decides_which_files_are_held_out(folder):
    held_out = {tuple(library(seed)[1].unique().tolist()) for seed in range(5)}
    assert len(held_out) > 1


def test_what_is_not_ascii_is_a_question_mark(folder):
    for i in range(20):
        (folder / f"{i:02d}.py").write_text("é" * 10, encoding="utf-8")
    assert library(0)[0].unique().tolist() == [ord("?")]


def test_stretches_are_of_the_seed_and_not_of_the_global_state():
    first = characters(3, context=5, windows=7, test_windows=2)
    torch.manual_seed(99)
    again, other = (characters(s, context=5, windows=7, test_windows=2) for s in (3, 4))
    assert torch.equal(first.x_train, again.x_train)
    assert torch.equal(first.y_test, again.y_test)
    assert not torch.equal(first.x_train, other.x_train)
    assert first.x_train.shape == first.y_train.shape == (7, 5)
    assert torch.equal(first.x_train[:, 1:], first.y_train[:, :-1])
