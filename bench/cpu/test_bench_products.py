"""What precedes a layer around a plain module, which its backward pass has nothing to do with.

    layers above   a backward pass of one layer behind 1 and behind 1000 small layers, less that of
                   these layers alone
    recurrence     a training step of T time steps h_t = layer(x_t + h_{t-1} / 2), T = 5 and 100,
                   in time per time step

Where products stay inside the cell, both ratios are near 1. The cases take turns, in one process.
``pytest bench/ --benchmark-only -k products``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdeq import DEQLayer

WIDE, BATCH, ROUNDS = 32, 16, 9
ABOVE, TIME_STEPS = (1, 1000), (5, 100)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDE, WIDE)
        with torch.no_grad():
            self.linear.weight.mul_(0.8)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def medians(runs: dict[int, Callable[[], float]], enabled: bool) -> dict[int, float]:
    seconds: dict[int, list[float]] = {size: [] for size in runs}
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
