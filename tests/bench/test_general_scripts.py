"""The scripts that measure memory and training, at sizes that take no time; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import general_memory
import general_models
import general_training
import pytest
import torch
from paths import ROOT

CPU = ROOT / "bench" / "cpu"


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(CPU / script), *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_allocations_are_counted_to_the_byte():
    x = torch.zeros(1000)

    def call():
        y = x + 1  # one
        z = y * 2  # two
        del y
        return (z + 1).sum()  # two again

    peak = general_memory.allocated(call)
    assert 8000 <= peak <= 8000 + 256
    assert general_memory.allocated(call) == peak


@pytest.mark.parametrize("name", general_memory.CONTESTANTS)
def test_allocated_memory_is_the_same_in_every_run_and_in_proportion(name):
    for mode in general_memory.MODES:
        first, second = (general_memory.measure(name, mode, 0.5)["allocated"] for _ in range(2))
        assert first == pytest.approx(second, rel=1e-4)
        larger = general_memory.measure(name, mode, 1.0)["allocated"]
        assert larger == pytest.approx(first, rel=0.02)


def test_memory_of_one_call_is_known():
    """Without a graph ``s z + x`` and its tanh are alive at once, and nothing else."""
    one = general_memory.measure("one call and its gradient", "forward", 0.5)["allocated"]
    assert one == pytest.approx(2, rel=0.01)


def test_the_memory_script(tmp_path):
    path = tmp_path / "memory.json"
    arguments = ("--mib", "0.05", "--contestant", "fastdeq-plain")
    done = run("general_memory.py", *arguments, "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "fastdeq-plain" in done.stdout
    states = json.loads(path.read_text())["states"]
    assert set(states) == {"fastdeq-plain"}
    assert states["fastdeq-plain"]["full"]["allocated"] > 2
    assert run("general_memory.py", "--mib", "0").returncode == 2


@pytest.mark.parametrize("name", general_models.TASKS)
def test_everybody_trains_from_the_same_start(name):
    if name == "digits":
        pytest.importorskip("sklearn")
    runs = general_training.train(general_models.TASKS[name](small=True), steps=3, every=2)
    assert set(runs) == set(general_training.CONTESTANTS)
    reference = runs["torchdeq-fixed-point"].losses
    for contestant, training in runs.items():
        assert len(training.step_seconds) == 3
        assert [steps for steps, _ in training.losses] == [2, 3]
        assert training.evaluations > 1, contestant
        assert training.passes > 1
        assert training.residual <= 1.1e-3
        for (_, loss), (_, expected) in zip(training.losses, reference, strict=True):
            assert loss == pytest.approx(expected, rel=0.02)


def test_seconds_to_a_loss():
    run = general_training.Run([1.0, 2.0, 4.0, 8.0], [(2, 0.9), (4, 0.3)])
    assert run.seconds_to(0.9) == 3
    assert run.seconds_to(0.5) == 15
    assert run.seconds_to(0.1) is None


def test_library_text_is_ascii():
    text = general_models.library_text(3000)
    assert text.shape == (3000,)
    assert int(text.max()) < general_models.ASCII
    assert len(text.unique()) > 40


def test_the_training_script(tmp_path):
    path = tmp_path / "training.json"
    arguments = ("--steps", "2", "--every", "1", "--small", "--task", "characters")
    done = run("general_training.py", *arguments, "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in general_training.CONTESTANTS)
    assert set(json.loads(path.read_text())["tasks"]) == {"characters"}
    assert run("general_training.py", "--steps", "0").returncode == 2
