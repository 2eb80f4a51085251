"""What precedes a layer around a plain module, which its backward pass has nothing to do with.

    layers above   a backward pass of one layer behind 1 and behind 1000 small layers, less that of
                   these layers alone
    recurrence     a training step of T time steps h_t = layer(x_t + h_{t-1} / 2), T = 5 and 100,
                   in time per time step
    peers          a training step of 100 of them, 64 wide, batch 32, and one thread, beside
                   torchdeq's solvers, all at a tolerance of 1e-3

Where products stay inside the cell, the first ratios are near 1. The cases take turns, in one
process. ``pytest bench/ --benchmark-only -k products``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contestants import torchdeq_options
from torch import Tensor, nn

from fastdeq import DEQLayer

WIDE, BATCH, ROUNDS = 32, 16, 9
ABOVE, TIME_STEPS = (1, 1000), (5, 100)


class Cell(nn.Module):
    def __init__(self, wide: int = WIDE) -> None:
        super().__init__()
        self.linear = nn.Linear(wide, wide)
        with torch.no_grad():
            self.linear.weight.mul_(0.8)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def medians(runs: dict[Any, Callable[[], float]], enabled: bool) -> dict[Any, float]:
    seconds: dict[Any, list[float]] = {size: [] for size in runs}
    for _ in range(ROUNDS if enabled else 1):
        for size, run in runs.items():
            seconds[size].append(run())
    return {size: statistics.median(taken) for size, taken in seconds.items()}


def timed(step: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    step().backward()
    return time.perf_counter() - begin


def table(tables, title: str, seconds: dict[int, float]) -> None:
    small, large = seconds
    row = (*(f"{s * 1e3:.2f}" for s in seconds.values()), f"{seconds[large] / seconds[small]:.2f}")
    tables.add(title, (str(small), str(large), "ratio"), row)


def test_bench_products_behind_layers(benchmark, tables):
    torch.manual_seed(0)
    layer, small = DEQLayer(Cell()), nn.Linear(WIDE, WIDE)
    x = torch.randn(BATCH, WIDE)

    def above(count: int) -> Tensor:
        y = x
        for _ in range(count):
            y = torch.tanh(small(y))
        return y

    def layer_alone(count: int) -> float:
        both, others = layer(above(count)).sum(), above(count).sum()
        return timed(lambda: both) - timed(lambda: others)

    runs = {count: lambda count=count: layer_alone(count) for count in ABOVE}
    seconds = medians(runs, benchmark.enabled)
    table(tables, "one layer behind so many others, its backward pass, in ms", seconds)
    benchmark.extra_info.update({str(k): v for k, v in seconds.items()})
    benchmark.pedantic(runs[ABOVE[1]], rounds=1)


def test_bench_products_recurrence(benchmark, tables):
    torch.manual_seed(0)
    layer, x = DEQLayer(Cell()), torch.randn(max(TIME_STEPS), BATCH, WIDE)

    def recurrence(count: int) -> Tensor:
        h = torch.zeros(BATCH, WIDE)
        for x_t in x[:count]:
            h = layer(x_t + 0.5 * h)
        return h.sum()

    runs = {
        count: lambda count=count: timed(lambda: recurrence(count)) / count for count in TIME_STEPS
    }
    seconds = medians(runs, benchmark.enabled)
    table(tables, "per time step of so many, forward and backward, in ms", seconds)
    benchmark.extra_info.update({str(k): v for k, v in seconds.items()})
    benchmark.pedantic(runs[TIME_STEPS[1]], rounds=1)


def test_bench_products_recurrence_beside_peers(benchmark, tables):
    torchdeq = pytest.importorskip("torchdeq")
    torch.manual_seed(0)
    cell, x = Cell(64), torch.randn(max(TIME_STEPS), 32, 64)

    def peer(solver: str) -> Callable[[Tensor], Tensor]:
        deq = torchdeq.get_deq(**torchdeq_options(solver, 1e-3, 1e-3, 40))
        deq.train()
        return lambda x_t: deq(lambda z: cell(z, x_t), torch.zeros_like(x_t))[0][-1]

    solvers = ("fixed_point_iter", "anderson", "broyden")
    layers = {"fastdeq": DEQLayer(cell, tol=1e-3), **{name: peer(name) for name in solvers}}

    def recurrence(layer: Callable[[Tensor], Tensor]) -> Tensor:
        h = torch.zeros_like(x[0])
        for x_t in x:
            h = layer(x_t + 0.5 * h)
        return h.sum()

    def run(name: str) -> Callable[[], float]:
        def timed_whole() -> float:
            begin = time.perf_counter()
            recurrence(layers[name]).backward()
            return time.perf_counter() - begin

        return timed_whole

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = medians({name: run(name) for name in layers}, benchmark.enabled)
    finally:
        torch.set_num_threads(threads)
    best = min(seconds[name] for name in solvers)
    row = (*(f"{s * 1e3:.0f}" for s in seconds.values()), f"{seconds['fastdeq'] / best:.2f}")
    head = (*seconds, "fastdeq / the fastest other")
    tables.add("100 time steps, forward and backward, in ms", head, row)
    benchmark.extra_info.update(seconds)
    benchmark.pedantic(run("fastdeq"), rounds=1)
