"""The examples run as a user runs them."""

from __future__ import annotations

import re
import statistics

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


def test_distributed(tmp_path):
    """Two processes that meet at a port which is free, and one, reach the same model."""
    losses = []
    for count in (2, 1):
        launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}")
        done = run("distributed.py", "--steps", "5", cwd=tmp_path, launch=launch)
        assert done.returncode == 0, done.stderr
        losses.append([float(n) for n in re.findall(r"loss (\S+);", done.stdout)])
    assert losses[0][-1] < losses[0][0]
    # Printed to four digits, of solves to a tolerance of 1e-5.
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


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


def test_recommend(tmp_path):
    done = run("recommend.py", "--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert all(len(line) < 80 for line in done.stdout.splitlines()[:-3])
    assert "1. scale = 0." in done.stdout
    assert "From orthogonal weights at scale" in done.stdout
    rows = re.findall(r"^(.*): (\S+)% of the test digits, (\d+)% of", done.stdout, re.MULTILINE)
    before, same_rate, after = ((float(a), float(c)) for _, a, c in rows)
    assert after[0] > 70
    assert max(before[0], same_rate[0]) < 50
    assert after[1] == 100
    assert max(before[1], same_rate[1]) < 10


def test_theory_check(tmp_path):
    done = run("theory_check.py", "--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = re.findall(
        r"^(\w+) +(.+?) +(\d+\.\d+) +(\d+\.\d+) +(\S+)% (?:\+- \S+%|one draw)$",
        done.stdout,
        re.MULTILINE,
    )
    assert len(rows) == 69
    assert len({row[:2] for row in rows}) == 69
    deviations = []
    for _, _, predicted, measured, deviation in rows:
        # Four decimals of each, of 0.2 or more.
        assert 100 * (float(measured) / float(predicted) - 1) == pytest.approx(
            float(deviation), abs=0.1
        )
        deviations.append(abs(float(deviation)))
    # Means over 2 draws with 32 vectors of 200 entries: 1 to 4 % each, fourth powers up to 8 %.
    assert statistics.median(deviations) < 4
    assert max(deviations) < 40
    assert "largest deviation: " in done.stdout
    refused = run("theory_check.py", "--features", "2", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--features must be at least 50" in refused.stderr
