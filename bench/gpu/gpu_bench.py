"""The benchmark of ``make gpu``: everybody on every problem, one section after another.

Results are written after each section, so that what is there survives a crash. What is under way is
written to a progress file first: should it hang or take the process down, ``gpu_supervise.py``
notes that, starts this program again, and it goes on with the next. A section for which too little
time is left is skipped, and the results say so.

    --device cpu    a dry run with tiny sizes: shows that the program works, measures nothing
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

# As a script it finds what the benchmarks share.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import torch
from gpu_calls import profiled
from gpu_clock import Clock, interleaved
from gpu_contestants import Contender, DeviceProblem, Settled, contenders, settle
from gpu_engines import engine_times
from gpu_floor import Ceilings, measured, training_floor
from gpu_machine import describe
from gpu_supervise import HUNG
from problems import Spec
from verify import NotReachedError

TOL = 1e-4
# By weight: what was asked for first comes first, should time run out.
SPECS = (
    Spec(256, 1024),
    Spec(1024, 1024),
    Spec(2048, 4096),
    Spec(64, 32),
    Spec(256, 1024, weight="symmetric"),
    Spec(256, 1024, weight="symmetric", scale=2.0),
    Spec(256, 1024, weight="orthogonal"),
    Spec(512, 512),
    Spec(128, 1024),
)
DRY_SPECS = (
    Spec(16, 8),
    Spec(12, 8, weight="symmetric", scale=2.0),
    Spec(12, 8, weight="orthogonal"),
)
DRY_NOTE = "dry run, not a measurement"
FORWARD = ", forward"
SECONDS = 5.0  # of rounds per problem
LEAST, MOST = 5, 60  # rounds
NEEDED = 20.0  # seconds that a problem takes at the least, compilation included
RUN_LIMIT = 30.0  # seconds, of a contestant that is warm


class Session:
    """Results so far, in a file, and what is under way, in another."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.path = Path(options.results)
        self.content: dict[str, Any] = {"problems": {}, "skipped": [], "left_out": {}}
        if self.path.is_file():
            self.content = json.loads(self.path.read_text())
        broken = Path(options.broken) if options.broken else None
        self.broken: list[list[str]] = []
        if broken is not None and broken.is_file():
            self.broken = json.loads(broken.read_text())

    def save(self) -> None:
        """Whole or not at all."""
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        draft.replace(self.path)

    def step(self, section: str, name: str, limit: float, *, silent: bool = False) -> None:
        """Says what is under way and after how many seconds it has to be taken for hanging."""
        if not silent:
            print(f"{section}: {name}" if name else section, flush=True)
        if self.options.progress:
            path = Path(self.options.progress)
            draft = path.with_suffix(".draft")
            draft.write_text(json.dumps({"step": [section, name], "limit": limit}))
            draft.replace(path)

    def why_broken(self, section: str, name: str) -> str:
        """Why this step is not to be taken (again); empty if it is."""
        here = [reason for s, n, reason in self.broken if n == name and s == section]
        elsewhere = [reason for _, n, reason in self.broken if n == name and n]
        if here:
            return f"it {here[0]}"
        # Waiting costs most: who hung once is not waited for again.
        if len(elsewhere) > 1 or any(HUNG in reason for reason in elsewhere):
            return f"not tried again: elsewhere it {elsewhere[0]}"
        return ""

    @property
    def left(self) -> float:
        return float(self.options.deadline) - time.time()


def section_name(spec: Spec) -> str:
    return f"{spec.weight} {spec.scale:g} {spec.d}x{spec.batch}"


def run(session: Session, device: torch.device) -> None:
    """All sections that are not done yet, while time lasts."""
    dry, clock = device.type != "cuda", Clock(device)
    content = session.content
    content["note"] = DRY_NOTE if dry else ""
    content["machine"] = describe(device)
    content["skipped"] = []
    if "ceilings" not in content:
        if session.left < 5:
            content["skipped"].append("ceilings and all problems: no time was left")
            return session.save()
        session.step("ceilings", "", 60)
        content["ceilings"] = measured(clock, small=dry)._asdict()
        session.save()
    ceilings = Ceilings(**content["ceilings"])
    everybody = contenders(compiled=not dry or session.options.compile)
    for spec in DRY_SPECS if dry else SPECS:
        section = section_name(spec)
        if section in content["problems"]:
            continue
        broken = session.why_broken(section, "")
        if broken:
            content["skipped"].append(f"{section}: {broken}")
            continue
        if session.left < (1 if dry else NEEDED):
            content["skipped"].append(f"{section}: time ran out")
            session.save()
            continue
        _problem(session, section, spec, everybody, clock, ceilings)
    return session.save()


def _problem(
    session: Session,
    section: str,
    spec: Spec,
    everybody: tuple[Contender, ...],
    clock: Clock,
    ceilings: Ceilings,
) -> None:
    """Everybody on one problem. Saved twice: the race, then the solves alone as well."""
    session.step(section, "", 60)
    problem = DeviceProblem(spec, clock.device)
    left_out: dict[str, str] = {}
    settled: dict[str, Settled] = {}
    for contender in everybody:
        if spec.weight not in contender.weights:
            continue
        name = contender.name
        left_out[name] = session.why_broken(section, name)
        if not left_out[name] and session.left < contender.least and clock.on_gpu:
            left_out[name] = "time ran out"
        if not left_out[name]:
            session.step(section, name, contender.patience)
            left_out[name] = _try(contender, problem, settled, clock)
    runs = {name: one.contestant.full for name, one in settled.items()}

    def announce(name: str) -> None:
        session.step(section, name.removesuffix(FORWARD), RUN_LIMIT, silent=True)

    seconds = min(SECONDS, max(1.0, session.left - 10)) if clock.on_gpu else 0.2
    times = interleaved(clock, runs, seconds, LEAST, MOST, announce)
    solves_too = {n + FORWARD: one.contestant.infer for n, one in settled.items()}
    calls = profiled(runs | solves_too, clock.device, announce)
    contestants = {}
    for name, one in settled.items():
        contestants[name] = one.facts | {
            "median_ms": 1e3 * statistics.median(times[name]),
            "fastest_ms": 1e3 * min(times[name]),
            "rounds": len(times[name]),
            "peak_mib": clock.peak_mib(runs[name]),
            "forward_calls": calls[name + FORWARD]._asdict(),
            "calls": calls[name]._asdict(),
        }
        products = one.facts["products"]
        if None not in products:
            count = sum(products) * spec.batch
            floor = training_floor(spec.d, spec.batch, count, ceilings)
            contestants[name]["floor_ms"] = floor._asdict()
    result: dict[str, Any] = {
        "problem": dataclasses.asdict(spec),
        "reference": reference_of(contestants),
        "contestants": contestants,
        "solves": {},
        "left_out": {name: reason for name, reason in left_out.items() if reason},
    }
    session.content["problems"][section] = result
    session.save()
    result["solves"] = engine_times(problem, clock, ceilings, set(settled), announce)
    session.step(section, "", 60, silent=True)
    session.save()


def _try(
    contender: Contender, problem: DeviceProblem, settled: dict[str, Settled], clock: Clock
) -> str:
    """Adds to ``settled``, or says why not."""
    try:
        settled[contender.name] = settle(contender, problem)
    except NotReachedError as reason:
        return str(reason)
    except Exception as error:  # a contestant's failure is a result
        return clock.survived(error)
    return ""


def reference_of(contestants: dict[str, Any]) -> str | None:
    """torchdeq's fastest solver, or the eager loop where it is not there."""
    for prefix in ("torchdeq", "eager-loop"):
        names = [name for name in contestants if name.startswith(prefix)]
        if names:
            return min(names, key=lambda name: float(contestants[name]["median_ms"]))
    return None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", required=True, help="JSON file, continued where it exists")
    parser.add_argument("--deadline", type=float, help="seconds since 1970; default: 5 minutes")
    parser.add_argument("--progress", help="file that says what is under way")
    parser.add_argument("--broken", help="JSON file of steps not to be taken")
    parser.add_argument("--compile", action="store_true", help="torch.compile in a dry run, too")
    options = parser.parse_args(arguments)
    options.deadline = options.deadline or time.time() + 300
    kept = Path(__file__).parents[1] / "results"
    if options.device == "cpu" and kept.resolve() in Path(options.results).resolve().parents:
        parser.error(f"a dry run does not write to {kept}")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --device cpu makes a dry run")
    torch.set_float32_matmul_precision("highest")
    run(Session(options), torch.device(options.device))


if __name__ == "__main__":
    main()
