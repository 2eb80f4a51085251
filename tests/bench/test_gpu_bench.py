"""``make gpu`` from end to end, as far as a machine without a GPU can show that it works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import gpu_bench
import gpu_environment
import gpu_report
import gpu_supervise
import pytest
import torch
from paths import ROOT

BENCH = ROOT / "bench" / "gpu"


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, str(BENCH / "gpu_run.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_ends_at_once():
    done = command()
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"make gpu: torch {torch.__version__} ")
    assert "needs an NVIDIA GPU" in line
    assert "make gpu PYTHON=" in line


def test_an_interpreter_that_is_not_there():
    done = command("--python", "no-such-python")
    assert done.returncode == 1
    assert "there is no interpreter 'no-such-python'" in done.stderr


def test_make_passes_its_interpreter_on():
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu", "PYTHON=/some/python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "/some/python bench/gpu/gpu_run.py"


def test_what_an_interpreter_lacks_is_said():
    found = {"executable": "/p", "version": [3, 12, 1], "why_no_gpu": ""}
    whole = found | dict.fromkeys(("venv", "pip", "setuptools", "pytest", "torch"), True)
    assert gpu_environment.why_not(whole) == ""
    said = gpu_environment.why_not(whole | {"venv": False, "pip": False})
    assert "/p has no venv and no pip" in said
    assert "python3-venv" in said
    assert "3.10 is needed" in gpu_environment.why_not(whole | {"version": [3, 9, 0]})
    assert "77 is needed" in gpu_environment.why_not(whole | {"setuptools_version": "65.5.0"})
    assert gpu_environment.why_not(whole | {"setuptools_version": "77.0.3"}) == ""
    old = {"device": "T4", "capability": [7, 5]}
    assert "T4 has compute capability 7.5" in gpu_environment.why_not(whole | old)


def test_the_environment_sees_what_its_interpreter_sees(tmp_path):
    """Also where that is the interpreter of a virtual environment, as it is here."""
    found = gpu_environment.probe(sys.executable)
    python = gpu_environment.create(found, tmp_path / "env")
    code = "import sys, torch, setuptools, pytest; print(sys.prefix, torch.__file__)"
    done = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split() == [str(tmp_path / "env"), torch.__file__]
    pip = [str(python), "-m", "pip", "--version"]
    subprocess.run(pip, capture_output=True, check=True, cwd=tmp_path)
    install = gpu_environment.install_command(python)
    assert {"--no-index", "--no-deps", "--no-build-isolation"} < set(install)


def test_programs_run_in_this_environment_but_for_the_interpreter_of_triton(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = gpu_environment.environment(MORE="1")
    assert (found["PYTHONPATH"], found["MORE"]) == ("/somewhere", "1")
    assert "TRITON_INTERPRET" not in found


def test_a_dry_run_goes_all_the_way_and_says_so(tmp_path, monkeypatch):
    kept = sorted((ROOT / "bench" / "results").iterdir())
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("OUT", str(out))
    done = command("--dry-run", "--work", str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted((ROOT / "bench" / "results").iterdir()) == kept
    (results,) = out.glob("gpu-*.json")
    content = json.loads(results.read_text())
    assert content["note"] == gpu_bench.DRY_NOTE
    assert content["skipped"] == []
    assert content["phases"]["benchmark"]["status"] == "passed"
    assert set(content["problems"]) == {gpu_bench.section_name(s) for s in gpu_bench.DRY_SPECS}
    for problem in content["problems"].values():
        found = problem["contestants"]
        assert {"fastdeq-auto", "fastdeq-reference", "eager-loop"} <= set(found)
        for contestant in found.values():
            allowed = 1.1 * gpu_bench.TOL
            assert max(contestant["residual"], contestant["adjoint_residual"]) < allowed
            assert contestant["median_ms"] > 0
        # No GPU engine can run here, and each says so.
        engines = [name for name in problem["left_out"] if name.startswith("fastdeq-cuda")]
        assert all("CUDA tensors" in problem["left_out"][name] for name in engines)
    assert "fastdeq-certified" in content["problems"]["orthogonal 0.9 12x8"]["contestants"]
    report = (out / "report.txt").read_text().splitlines()
    assert report[-1] == f"*** {gpu_bench.DRY_NOTE} ***"
    titles = [line for line in report if line.startswith("---")]
    assert titles[-1] == "--- time relative to the reference ---"
    assert {path.name for path in out.iterdir()} >= {"benchmark.log", "report.txt"}


def test_a_dry_run_does_not_write_to_the_results(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_bench.main(
            ["--device", "cpu", "--results", str(ROOT / "bench" / "results" / "gpu-x.json")]
        )
    assert ended.value.code == 2
    assert "does not write to" in capsys.readouterr().err


def test_what_there_is_no_time_for_is_skipped_and_said(tmp_path):
    results = tmp_path / "results.json"
    gpu_bench.main(
        ["--device", "cpu", "--results", str(results), "--deadline", str(time.time() - 1)]
    )
    content = json.loads(results.read_text())
    assert content["skipped"] == ["ceilings and all problems: no time was left"]
    assert any("SKIPPED: ceilings" in line for line in gpu_report.lines(content))


def session(tmp_path, broken):
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    options = SimpleNamespace(
        results=tmp_path / "results.json", broken=tmp_path / "broken.json", progress=None
    )
    return gpu_bench.Session(options)


def test_a_step_that_broke_is_not_taken_again(tmp_path):
    crash, hang = "ended the process (SIGSEGV)", f"{gpu_supervise.HUNG} within 45 s"
    broken = [["p", "a", crash], ["p", "b", hang], ["p", "c", crash], ["q", "c", crash]]
    steps = session(tmp_path, broken)
    assert steps.why_broken("p", "a") == f"it {crash}"
    assert steps.why_broken("q", "a") == ""  # one crash elsewhere: another try
    assert steps.why_broken("q", "b") == f"not tried again: elsewhere it {hang}"
    assert steps.why_broken("r", "c").startswith("not tried again")
    assert steps.why_broken("p", "d") == ""


CHILD = """
import argparse, json, os, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("--progress", "--broken", "--deadline"):
    parser.add_argument(name)
options = parser.parse_args()
broken = [step[1] for step in json.load(open(options.broken))]
def step(name, limit):
    json.dump({"step": ["section", name], "limit": limit}, open(options.progress, "w"))
    print("at", name, flush=True)
if "hangs" not in broken:
    step("hangs", 0.5)
    time.sleep(60)
if "crashes" not in broken:
    step("crashes", 30)
    os.kill(os.getpid(), signal.SIGSEGV)
if sys.argv[-1] == "x" or "fails" not in broken:
    step("fails", 30)
    sys.exit(3)
step("works", 30)
"""


def test_a_benchmark_that_hangs_and_crashes_comes_to_its_end(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    begin = time.monotonic()
    state, broken = gpu_supervise.to_the_end(
        [sys.executable, str(child)], tmp_path, time.time() + 60, os.environ, tmp_path
    )
    assert state == "finished"
    assert broken == [
        ["section", "hangs", "did not end within 0 s"],
        ["section", "crashes", "ended the process (SIGSEGV)"],
        ["section", "fails", "ended the process (status 3)"],
    ]
    assert "at works" in (tmp_path / "benchmark.log").read_text()
    assert time.monotonic() - begin < 40


def test_a_benchmark_at_the_deadline_has_not_failed(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(CHILD.replace("0.5", "50"))
    state, broken = gpu_supervise.to_the_end(
        [sys.executable, str(child)], tmp_path, time.time() - 4, os.environ, tmp_path
    )
    assert state == "time ran out, at section: hangs; what would have followed is missing"
    assert broken == []


def test_a_benchmark_that_breaks_at_the_same_step_is_given_up(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(CHILD.replace("not in broken", "!= 1"))
    child.write_text(child.read_text().replace("time.sleep(60)", "sys.exit(1)"))
    state, broken = gpu_supervise.to_the_end(
        [sys.executable, str(child)], tmp_path, time.time() + 60, os.environ, tmp_path
    )
    assert state.startswith("given up: section: hangs twice ended the process")
    assert len(broken) == 2


def test_a_program_is_stopped_with_what_it_started(tmp_path):
    log, mark = tmp_path / "log", tmp_path / "mark"
    inner = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = "import subprocess, sys; print('begun', flush=True); "
    code += f"subprocess.run([sys.executable, '-c', {inner!r}])"
    done = gpu_supervise.run([sys.executable, "-c", code], log, 1.0, os.environ, tmp_path)
    assert done.status is None
    assert done.output.startswith("begun")
    assert log.read_text().startswith("begun")
    time.sleep(3.5)
    assert not mark.exists()
