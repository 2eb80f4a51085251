"""Solves on one and on two threads beside busy processes: `python bench/cpu/busy_threads.py 2`.

The argument is the number of busy processes, 0 to measure a quiet machine. Calls of the operators
are timed in turns of a tenth of a second, forward and backward, one sample and whole batches;
printed are medians in microseconds and their ratio, two threads over one.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "cases"))
from engine_cases import Adjoint, Call, make_forward

from fastdeq.solvers import Neumann, Picard

SHAPES = (
    *((16, 64), (16, 512), (32, 16), (32, 64), (64, 16), (64, 64), (64, 512)),
    *((256, 64), (512, 128), (1024, 256), (1024, 1), (2048, 1)),
)
SECONDS, TURN = 3.0, 0.1  # of a shape; of a number of threads within it


def burn() -> None:
    while True:
        sum(range(10_000))


def medians(size: int, batch: int) -> dict[tuple[int, str], float]:
    """Of a call, in seconds, by threads and direction."""
    torch.manual_seed(0)
    forward = make_forward(batch, size, torch.float32)
    adjoint = Adjoint(forward.weight, torch.rand(batch, size), torch.randn(batch, size))
    calls = {
        "forward": (
            torch.ops.fastdeq.solve_affine.default,
            forward.arguments(Call(Picard(), 1e-4, 100, "auto"), "cpp"),
        ),
        "backward": (
            torch.ops.fastdeq.solve_affine_adjoint.default,
            adjoint.arguments(Call(Neumann(), 1e-4, 100, "auto"), "cpp"),
        ),
    }
    times: dict[tuple[int, str], list[float]] = {(t, name): [] for t in (1, 2) for name in calls}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            turn = time.perf_counter() + TURN
            while time.perf_counter() < turn:
                for name, (operator, arguments) in calls.items():
                    begin = time.perf_counter()
                    operator(*arguments)
                    times[threads, name].append(time.perf_counter() - begin)
    return {key: statistics.median(values) for key, values in times.items()}


def main(busy: int) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=burn, daemon=True) for _ in range(busy)]
    for process in processes:
        process.start()
    print(f"{busy} busy processes; us on one thread, on two, ratio")
    for size, batch in SHAPES:
        found = medians(size, batch)
        columns = []
        for name in ("forward", "backward"):
            one, two = found[1, name] * 1e6, found[2, name] * 1e6
            columns.append(f"{name} {one:9.1f} {two:9.1f} {two / one:5.2f}")
        print(f"{size:5} x {batch:<4}", "   ".join(columns), flush=True)
    for process in processes:
        process.terminate()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
