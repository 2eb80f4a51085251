"""The command as a user meets it: errors are said in words, with a status and no traceback."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import BrokenExecutor

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("jsonargparse")

from fastdeq.study import command, quick
from fastdeq.study.command import main, study_from

TINY = [
    *("--tasks", "[digits]", "--weights", "[dense]", "--seeds", "1", "--jobs", "1"),
    *("--images.scales", "[0.5]", "--images.activations", "[tanh]", "--images.epochs", "1"),
    *("--images.methods", "[auto/implicit]", "--images.features", "8"),
    *("--initial.scales", "[0.5]", "--initial.activations", "[tanh]"),
    *("--initial.features", "8", "--initial.draws", "3"),
]


def test_a_study_in_a_folder_with_brackets_names_it(tmp_path, capsys):
    folder = tmp_path / "[red]"
    assert main([*TINY, "--out", str(folder)]) == 0
    out = capsys.readouterr().out.replace("\n", "")
    assert "[red]/report.html" in out
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{file}/x"], "NotADirectoryError"),
        (["--tasks", "[mnist]", "--mnist", "{folder}"], "neither train-images-idx3-ubyte nor"),
        (["--scheduler", "nonsense"], "Is there a dask scheduler at nonsense?"),
    ],
    ids=["file", "mnist", "scheduler"],
)
def test_what_stops_a_study_is_said_without_a_traceback(tmp_path, capsys, options, message):
    if "--scheduler" in options:
        pytest.importorskip("distributed")
    (tmp_path / "file").touch()
    paths = {"file": tmp_path / "file", "folder": tmp_path}
    options = [o.format(**paths) for o in options]
    assert main([*TINY, "--out", str(tmp_path / "out"), *options]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "the same command continues" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (BrokenExecutor("gone"), "fewer --jobs"),
        (PermissionError(13, "Permission denied", "a[b]"), "Permission denied: 'a[b]'"),
    ],
    ids=["disk", "memory", "permission"],
)
def test_trouble_in_the_middle_is_said_as_well(tmp_path, capsys, monkeypatch, error, message):
    def stopped(*_, **__):
        raise error

    monkeypatch.setattr(command, "perform", stopped)
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs must be"),
        (["--jobs", "many"], "jobs"),
        (["--tasks", "[digits, digits]"], "lists 'digits' twice"),
        (["--images.tol", "-1"], "tol"),
        (["--config", "{unknown}"], "foo"),
        (["--config", "{broken}"], "config"),
    ],
    ids=["none", "word", "twice", "tol", "unknown", "broken"],
)
def test_errors_of_options_fit_a_screen(tmp_path, capsys, arguments, message):
    files = {"unknown": "seeds: 3\nfoo: 1\n", "broken": "a: [\n"}
    paths = {name: tmp_path / f"{name}.yaml" for name in files}
    for name, text in files.items():
        paths[name].write_text(text)
    with pytest.raises(SystemExit) as stopped:
        study_from([a.format(**paths) for a in arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) < 8


def test_quick_in_a_file_is_quick(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("quick: true\n")
    assert study_from(["--config", str(path)])[0] == quick()


def test_without_the_extra_the_command_says_what_to_install():
    code = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'rich' else find(n, *a)\n"
        "sys.argv = ['fastdeq', 'study', '--quick']\n"
        "from fastdeq.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "pip install fastdeq[study]" in done.stderr
    assert "Traceback" not in done.stderr
