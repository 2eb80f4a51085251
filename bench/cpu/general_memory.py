"""Peak memory of a general solve, in states: `python bench/cpu/general_memory.py`.

A state of 64 MiB, 12 iterations in each direction (no tolerance stops them), a cell that is one
elementwise function, ``tanh(s z + x)``. Everybody runs in a process of its own, warmed up on a
small state, and calls twice, as training does, so that what a call leaves behind counts. Two
measures of what that needs beyond what the caller holds (x, z0, dL/dz):

    allocated   the largest sum of the allocations and releases that PyTorch's CPU allocator
                reports to its profiler: the same in every run, to a few bytes
    resident    how far the process's resident set rose above what it was before the call
                (VmHWM, reset before it; Linux): memory that others allocate, and that PyTorch
                keeps, counts; pages that were never touched do not

``--mib 4`` makes it quick; ``--json PATH`` writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))

import torch
from general_contestants import Bare, GeneralContestant, GeneralFastDEQ, GeneralTorchDEQ, Tutorial
from general_problem import Counts, GeneralSpec
from loops import PLAIN
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

ITERATIONS, BATCH = 12, 16
NEVER = 1e-30  # a tolerance that no residual meets
CONTESTANTS: dict[str, Callable[..., GeneralContestant]] = {
    "fastdeq-auto": partial(GeneralFastDEQ, on_failure="ignore"),
    "fastdeq-plain": partial(GeneralFastDEQ, on_failure="ignore", **PLAIN),
    "torchdeq-fixed-point": partial(GeneralTorchDEQ, solver="fixed_point_iter"),
    "torchdeq-anderson": partial(GeneralTorchDEQ, solver="anderson"),
    "tutorial-anderson": Tutorial,
    "one call and its gradient": partial(Bare, counts=Counts(graph_calls=1, other_passes=1)),
}
MODES = ("forward", "full")


class Elementwise(nn.Module):
    """``tanh(s z + x)``, slopes s of 0.5 to 0.95: nothing is reached within 12 iterations."""

    def __init__(self, d: int):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 0.95, d))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(torch.addcmul(x, self.scale, z))


class MemoryProblem:
    """What a contestant asks of a problem."""

    def __init__(self, elements: int):
        d = elements // BATCH
        self.spec = GeneralSpec("elementwise", (BATCH, d), max_iter=ITERATIONS)
        self.cell = Elementwise(d)
        generator = torch.Generator().manual_seed(0)
        self.x, self.grad = (torch.randn(BATCH, d, generator=generator) for _ in range(2))
        self.start = torch.zeros(BATCH, d)


def _call(name: str, mode: str, elements: int) -> Callable[[], Any]:
    problem: Any = MemoryProblem(elements)
    contestant = CONTESTANTS[name](problem, NEVER, NEVER)
    if isinstance(contestant, Bare):
        contestant.value = None  # of its own making, below

        def once() -> None:
            with torch.set_grad_enabled(mode == "full"):
                z = contestant.cell(contestant.at, contestant.x)
            if mode == "full":
                torch.autograd.grad(z, contestant.leaves, problem.grad)

        return once

    def solve() -> None:
        if mode == "forward":
            contestant.infer()
        else:
            z = contestant.attached()
            torch.autograd.grad(z, contestant.leaves, problem.grad)

    return solve


def allocated(call: Callable[[], Any]) -> int:
    """Bytes: the most that was held at once beyond what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        most = max(most, held)
    return most


def resident(call: Callable[[], Any]) -> int | None:
    """Bytes by which the resident set rose at most; None where the system does not tell."""
    clear = Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(name: str, mode: str, mib: float) -> dict[str, float | None]:
    """Both measures in states, of this process."""
    elements = int(mib * 2**20) // 4 // BATCH * BATCH
    _twice(name, mode, 16 * BATCH)()  # loads what is loaded at the first call
    rose = resident(_twice(name, mode, elements))  # before the profiler, which keeps its events
    states = 4 * elements
    return {
        "resident": None if rose is None else rose / states,
        "allocated": allocated(_twice(name, mode, elements)) / states,
    }


def _twice(name: str, mode: str, elements: int) -> Callable[[], None]:
    """Two calls of a contestant that has made none.

    The profiler knows nothing of what was allocated before it, so nothing may be left from there.
    """
    call = _call(name, mode, elements)

    def twice() -> None:
        call()
        call()

    return twice


def in_a_process(name: str, mode: str, mib: float) -> dict[str, float | None]:
    command = [sys.executable, __file__, "--mib", str(mib), "--only", name, mode]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name}, {mode}: {done.stderr}")
    found: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=float, default=64.0, help="size of the state")
    parser.add_argument(
        "--contestant", choices=CONTESTANTS, action="append", help="default: all of them"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--only", nargs=2, metavar=("NAME", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mib * 2**20 < 4096 or not math.isfinite(options.mib):
        parser.error("--mib must be at least 0.004")
    if options.only:
        print(json.dumps(measure(*options.only, options.mib)))
        return
    found = {}
    print(f"states of {options.mib:g} MiB beyond x, z0 and dL/dz; {ITERATIONS} iterations")
    print(f"{'':28}{'forward':>22}{'forward + backward':>22}")
    print(f"{'':28}{'allocated   resident':>22}{'allocated   resident':>22}")
    for name in options.contestant or CONTESTANTS:
        found[name] = {mode: in_a_process(name, mode, options.mib) for mode in MODES}
        cells = (
            f"{_shown(result['allocated']):>11}{_shown(result['resident']):>11}"
            for result in found[name].values()
        )
        print(f"{name:28}{''.join(cells)}", flush=True)
    if options.json:
        content = {"mib": options.mib, "iterations": ITERATIONS, "torch": torch.__version__}
        options.json.write_text(json.dumps(content | {"states": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
