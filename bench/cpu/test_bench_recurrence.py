"""Small solves, one after another, where the time is what surrounds them.

    recurrence   100 time steps h_t = layer(x_t + h_{t-1}), 64 wide, batch 32, forward and backward:
                 one solve per step, against ten unrolled steps of the same cell per step
    small        one layer alone, inference and training step

The contestants take turns, in one process, and the ratio is that of the medians.
``pytest bench/ --benchmark-only -k recurrence`` or ``-k small``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdeq import AffineCell, DEQLayer

TIME_STEPS, UNROLLED, WIDE, BATCH = 100, 10, 64, 32
ROUNDS = 15
SMALL = ((32, 16), (64, 32))
CALLS = 50  # of a small layer in one timing


def make(size: int, batch: int, *shape: int) -> tuple[AffineCell, Tensor]:
    torch.manual_seed(0)
    cell = AffineCell(size, size, activation="tanh", weight="dense", scale=0.9)
    return cell, torch.randn(*shape, batch, size)


def interleaved(
    runs: dict[str, Callable[[], Any]], enabled: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """The median and the least of the seconds that each run took."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS if enabled else 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    least = {name: min(seconds) for name, seconds in times.items()}
    return {name: statistics.median(seconds) for name, seconds in times.items()}, least


def recurrence(step: Callable[[Tensor], Tensor], cell: AffineCell, x: Tensor) -> None:
    cell.zero_grad()
    h = torch.zeros(BATCH, WIDE)
    for x_t in x:
        h = step(x_t + h)
    h.sum().backward()


def unrolled(cell: AffineCell, x: Tensor) -> Tensor:
    """Ten steps, with the injection computed once."""
    c, transposed = cell.injection(x), cell.weight.weight.t()
    z = torch.tanh(c)
    for _ in range(UNROLLED - 1):
        z = torch.tanh(torch.addmm(c, z, transposed))
    return z


def test_bench_recurrence(benchmark, tables):
    cell, x = make(WIDE, BATCH, TIME_STEPS)
    layer = DEQLayer(cell)
    runs = {
        "fastdeq": lambda: recurrence(layer, cell, x),
        "unrolled": lambda: recurrence(lambda x: unrolled(cell, x), cell, x),
    }
    seconds, least = interleaved(runs, benchmark.enabled)
    title = f"{TIME_STEPS} time steps, {WIDE} wide, batch {BATCH}, forward and backward, in ms"
    head = ("", "median", "least", "to unrolled")
    for name in runs:
        ratio = seconds[name] / seconds["unrolled"]
        row = (name, f"{seconds[name] * 1e3:.1f}", f"{least[name] * 1e3:.1f}", f"{ratio:.2f}")
        tables.add(title, head, row)
    benchmark.extra_info.update(seconds, time_steps=TIME_STEPS, threads=torch.get_num_threads())
    benchmark.pedantic(runs["fastdeq"], rounds=1)


@pytest.mark.parametrize(("size", "batch"), SMALL)
def test_bench_small(benchmark, tables, size, batch):
    cell, x = make(size, batch)
    layer, grad = DEQLayer(cell), torch.randn(batch, size)

    def infer() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                layer(x)

    def train() -> None:
        for _ in range(CALLS):
            layer(x).backward(grad)

    runs = {"inference": infer, "training step": train}
    seconds, least = interleaved(runs, benchmark.enabled)
    head = ("", *runs)
    times = (
        f"{least[name] / CALLS * 1e6:.0f} ({seconds[name] / CALLS * 1e6:.0f})" for name in runs
    )
    tables.add("one small layer, in us: least (median)", head, (f"{size}x{batch}", *times))
    benchmark.extra_info.update(seconds, calls=CALLS, threads=torch.get_num_threads())
    benchmark.pedantic(train, rounds=1)
