"""The examples run as a user runs them."""

from __future__ import annotations

import re

import pytest
from run_example import run_example as run

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_digits(tmp_path):
    done = run("digits.py", "--quick", "--features", "32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for family in ("dense", "orthogonal", "symmetric"):
        assert len(re.findall(rf"│ {family} ", done.stdout)) == 2
    assert "Figure saved as demo.png" in done.stdout
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    # No progress bar in a log: the table, its notes and a few lines around it.
    assert len(done.stdout.splitlines()) < 25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "nowhere/demo.png"], "there is no folder nowhere"),
        (["--scales", "-1"], "scale must be positive"),
        (["--families", "circulant"], "invalid choice: 'circulant'"),
    ],
)
def test_digits_refuses_before_it_trains(tmp_path, options, message):
    done = run("digits.py", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_custom_module(tmp_path):
    done = run("custom_module.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    losses = [float(n) for n in re.findall(r"loss (\S+);", done.stdout)]
    assert losses[-1] < 0.5 * losses[0]
    zero, warm = (
        int(re.search(rf"{start} start: .*to (\d+);", done.stdout)[1]) for start in ("zero", "warm")
    )
    assert warm < zero


def test_structured_weights(tmp_path):
    done = run("structured_weights.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = re.findall(r"^(.{20}) .* (\d+\.\d)% +(\S+)  (\S+) \+- (\S+)$", done.stdout, re.MULTILINE)
    assert len(rows) == 4
    for _, accuracy, _, radius, error in rows:
        assert float(accuracy) > 94
        assert float(radius) < 1.1
        assert float(error) <= 2e-2
