"""``make gpu``: builds, tests, checks and measures on a machine with an NVIDIA GPU and no network.

    build      fastdeq against the torch that is there, in .venv-gpu
    tests      pytest tests/kernels on the device
    sanitizer  compute-sanitizer on a few small solves, where it is installed
    benchmark  gpu_bench.py, into bench/results/gpu-<device>.json

All of it ends within a time limit: a part gets what is left, less what the parts after it are to
have, and what time is too short for is skipped and said to be. A failed test does not keep the
benchmark from running. Exit status: 0 if all that ran is well, else 1. The table of ratios comes
last. Where OUT names a folder, results and logs are copied there.

Needs nothing but the standard library: it is run by the interpreter that has torch, before fastdeq
is built.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpu_environment import CannotError, create, environment, install_command, probe, why_not
from gpu_supervise import STOPPED, Outcome, run, to_the_end

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("build", "tests", "sanitizer", "benchmark")
SECONDS = 480.0
# Files of one run in its folder; an older run's go first.
_WRITTEN = ("build.log", "info.log", "tests.log", "sanitizer.log", "benchmark.log", "report.txt")
_WRITTEN += ("results.json", "progress.json", "broken.json", "gpu-*.json")
# What later parts are to have, at least, in seconds.
_FOR_SANITIZER, _FOR_BENCHMARK, _FOR_REPORT = 30.0, 190.0, 10.0
_MOST_TESTS, _MOST_SANITIZER = 150.0, 45.0  # the latter for each of the two tools
_ONE_TEST = 90  # seconds
_KERNEL_HANGS = "--timeout-method=thread"  # a signal does not reach a thread that waits for a GPU


class Phase(NamedTuple):
    """What became of a part: passed, failed, stopped (out of time) or skipped."""

    status: str
    seconds: float
    detail: str = ""


class Command:
    """One ``make gpu``."""

    def __init__(self, options: argparse.Namespace, found: dict[str, Any], begin: float):
        self.options, self.found, self.begin = options, found, begin
        self.work = Path(options.work).resolve()
        self.phases: dict[str, Phase] = {}
        self.python = Path(sys.executable)
        self.work.mkdir(parents=True, exist_ok=True)
        for pattern in _WRITTEN:
            for path in self.work.glob(pattern):
                path.unlink()

    @property
    def left(self) -> float:
        return float(self.options.seconds) - (time.time() - self.begin)

    def part(self, name: str, do: Callable[[], Phase]) -> None:
        """Does a part and says how it ended."""
        print(f"\n=== {name} ===", flush=True)
        skip = name in self.options.skip
        phase = Phase("skipped", 0.0, "not asked for") if skip else do()
        self.phases[name] = phase
        print(f"{name}: {phase.status} in {phase.seconds:.0f} s. {phase.detail}", flush=True)
        self.publish()

    def run(self, command: list[str], log: str, limit: float, show: bool, **more: str) -> Outcome:
        env = environment(**more)
        return run(command, self.work / log, limit, env, ROOT, show=show)

    def publish(self) -> None:
        """Copies logs and results to $OUT, after every part, should a later one be cut off."""
        out = os.environ.get("OUT")
        if not out:
            return
        os.makedirs(out, exist_ok=True)
        for pattern in _WRITTEN:
            for path in self.work.glob(pattern):
                shutil.copy(path, out)

    def build(self) -> Phase:
        found = self.found
        self.python = create(found, ROOT / ".venv-gpu")
        # The extension lies in the source folder: an environment that shares it is to build anew.
        (ROOT / ".venv" / ".ready").unlink(missing_ok=True)
        command = install_command(self.python)
        limit = max(30.0, self.left - _FOR_BENCHMARK - 60)
        done = self.run(command, "build.log", limit, show=False)
        phase = Phase("passed", done.seconds, f"torch {found['torch_version']}, {found['device']}")
        if done.status != 0:
            print("\n".join(done.output.splitlines()[-40:]))
            print("building without the extension: Triton and plain PyTorch are still to be had")
            again = self.run(command, "build.log", 60, show=False, FASTDEQ_NO_EXT="1")
            if again.status != 0:
                raise CannotError(f"fastdeq cannot be installed; see {self.work / 'build.log'}")
            how = "was stopped" if done.status is None else "failed"
            phase = Phase("failed", done.seconds, f"compiling {how}: see build.log")
        self.run([str(self.python), "-m", "fastdeq", "info"], "info.log", 60, show=True)
        return phase

    def tests(self) -> Phase:
        limit = min(_MOST_TESTS, self.left - _FOR_BENCHMARK - _FOR_SANITIZER)
        if limit < 15:
            return Phase("skipped", 0.0, "time ran out")
        done = self.run(self._pytest(), "tests.log", limit, show=True)
        return Phase(_status(done), done.seconds, pytest_summary(done.output))

    def _pytest(self) -> list[str]:
        # Without addopts: strict settings refuse what belongs to plugins that may not be there.
        options = ["-q", "-o", "addopts=-ra", "-p", "no:cacheprovider", "--maxfail=40"]
        if self._has("pytest_timeout"):
            options += [f"--timeout={_ONE_TEST}", _KERNEL_HANGS]
        if self._has("xdist"):
            # A test that hangs takes its process along; with several, the others go on.
            options += ["-n", str(max(1, min(4, (os.cpu_count() or 1) // 2))), "--dist=worksteal"]
        return [str(self.python), "-m", "pytest", "tests/kernels", *options]

    def _has(self, module: str) -> bool:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"
        return self.run([str(self.python), "-c", code], "info.log", 30, show=False).status == 0

    def sanitizer(self) -> Phase:
        tool = shutil.which("compute-sanitizer") or _beside_nvcc()
        if tool is None:
            return Phase("skipped", 0.0, "compute-sanitizer is not installed")
        found, seconds = [], 0.0
        for check, only in (("memcheck", []), ("racecheck", ["--engine", "persistent"])):
            limit = min(_MOST_SANITIZER, self.left - _FOR_BENCHMARK)
            if limit < 10:
                found.append((check, "skipped", "time ran out"))
                continue
            command = [tool, "--tool", check, "--launch-timeout", "60", "--report-api-errors", "no"]
            command += [str(self.python), "bench/gpu/gpu_smallest.py", *only]
            # Every tensor is an allocation of its own, so that its ends are seen.
            more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            done = self.run(command, "sanitizer.log", limit, show=False, **more)
            seconds += done.seconds
            found.append((check, *sanitizer_verdict(done)))
        bad = any(status == "failed" for _, status, _ in found)
        ran = any(status == "passed" for _, status, _ in found)
        detail = "; ".join(f"{check} {status}: {text}" for check, status, text in found)
        return Phase("failed" if bad else "passed" if ran else "skipped", seconds, detail)

    def benchmark(self) -> Phase:
        begin, results = time.time(), self.work / "results.json"
        if self.left < 40 and not self.options.dry_run:
            return Phase("skipped", 0.0, "time ran out")
        device = "cpu" if self.options.dry_run else "cuda"
        command = [str(self.python), "bench/gpu/gpu_bench.py", "--device", device]
        command += ["--results", str(results)]
        deadline = begin + self.left - _FOR_REPORT
        state, broken = to_the_end(command, self.work, deadline, environment(), ROOT, show=True)
        found = [f"{s}: {n or 'the problem'} {reason}" for s, n, reason in broken]
        good = (state == "finished" or state.startswith(STOPPED)) and not broken
        detail = "; ".join([state, *found])
        return Phase("passed" if good else "failed", time.time() - begin, detail)

    def report(self) -> None:
        """Writes the results with what became of the parts, and prints them."""
        results = self.work / "results.json"
        if not results.is_file():
            print("\nno benchmark results")
            return
        content: dict[str, Any] = json.loads(results.read_text())
        content["phases"] = {name: phase._asdict() for name, phase in self.phases.items()}
        state = self.phases["benchmark"].detail
        if state.startswith(STOPPED):
            content["skipped"].append(state)
        named = self.work / file_name(content["machine"]["device"])
        results.write_text(json.dumps(content, indent=1) + "\n")
        shutil.copy(results, named)
        if not content["note"]:
            kept = ROOT / "bench" / "results" / named.name
            kept.parent.mkdir(exist_ok=True)
            shutil.copy(named, kept)
            print(f"\nwritten: {kept.relative_to(ROOT)}")
        command = [str(self.python), "bench/gpu/gpu_report.py", str(named)]
        self.run(command, "report.txt", 60, show=True)
        self.publish()


def _status(done: Outcome) -> str:
    if done.status is None:
        return "stopped"
    return "passed" if done.status == 0 else "failed"


def _beside_nvcc() -> str | None:
    nvcc, home = shutil.which("nvcc"), os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [Path(home) / "bin", *([Path(nvcc).resolve().parent] if nvcc else [])]
    return next(filter(None, (shutil.which("compute-sanitizer", path=f) for f in folders)), None)


def file_name(device: str) -> str:
    """``gpu-<device>.json``: lower case, letters, digits and hyphens."""
    return f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def pytest_summary(output: str) -> str:
    """The counts that pytest printed last, and which tests failed."""
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)\b.* in [\d.]+s.*", output)
    names = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    shown = f"; failed: {', '.join(names[:40])}" if names else ""
    return re.sub(r" =+$", "", counts[-1] if counts else "no summary") + shown


def sanitizer_verdict(done: Outcome) -> tuple[str, str]:
    """Status and text from what compute-sanitizer printed: its own exit status says less."""
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (.*)", done.output)
    wrong = "WRONG" in done.output
    if found is None:
        reason = "stopped: out of time" if done.status is None else "it could not run here"
        return "skipped", reason
    if int(found[1]) or wrong:
        return "failed", f"{found[1]} {found[2]}" + (", and a wrong answer" if wrong else "")
    ran = re.search(r"(\d+) ran", done.output)
    if ran is None:
        return "failed", "the solves did not come to their end"
    if not int(ran[1]):
        return "skipped", "no engine to check"
    return "passed", f"{ran[1]} solves, nothing found"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has torch")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--skip", nargs="*", choices=PARTS, default=[])
    parser.add_argument("--work", default=str(ROOT / "build" / "gpu"), help="folder for logs")
    parser.add_argument(
        "--dry-run", action="store_true", help="the benchmark alone, tiny, on the CPU, not kept"
    )
    options = parser.parse_args(arguments)
    if options.dry_run:
        options.skip = [part for part in PARTS if part != "benchmark"]
    begin, found = time.time(), {}
    try:
        if not options.dry_run:
            found = probe(options.python)
            if why_not(found):
                raise CannotError(why_not(found))
        command = Command(options, found, begin)
        for name in PARTS:
            command.part(name, getattr(command, name))
    except CannotError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 1
    command.report()
    well = all(phase.status in ("passed", "skipped") for phase in command.phases.values())
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
