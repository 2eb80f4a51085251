"""One slow sample among 64: what it costs with and without ``compact``.

    all alike     every sample contracts by 0.42 in each step: 9 evaluations
    one slow      one sample contracts by 0.926: about 75 evaluations
    compact       the same, finished samples left out

for a convolution, whose cost is that of its samples, and an MLP of 2 MiB, which is read whole for
one sample too. Times relative to the first; plain steps, a relative tolerance of 1e-3. The cases
take turns, in one process. ``pytest bench/ --benchmark-only -k compact``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastdeq import DEQLayer

BATCH, SLOW, ROUNDS = 64, 7, 9
FAST_GAIN, SLOW_GAIN = 0.42, 0.926


class Contraction(nn.Module):
    """A rotation times the sample's gain, and a small share of an inner module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        return gain * z.roll(1, -1) + 1e-3 * self.inner(z) + x


def convolution() -> tuple[nn.Module, Tensor]:
    inner = nn.Sequential(
        nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1)
    )
    return Contraction(inner), torch.randn(BATCH, 48, 16, 16)


def mlp() -> tuple[nn.Module, Tensor]:
    inner = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
    return Contraction(inner), torch.randn(BATCH, 256)


def step(layer: DEQLayer, x: Tensor, gain: Tensor, differentiate: bool) -> float:
    begin = time.perf_counter()
    with torch.set_grad_enabled(differentiate):
        z = layer(x, gain)
        if differentiate:
            z.sum().backward()
    return time.perf_counter() - begin


@pytest.mark.parametrize("differentiate", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("make", [convolution, mlp], ids=lambda make: make.__name__)
def test_bench_compact(benchmark, tables, make: Callable, differentiate: bool):
    torch.manual_seed(0)
    cell, x = make()
    alike = torch.full((BATCH, *[1] * (x.dim() - 1)), FAST_GAIN)
    one_slow = alike.clone()
    one_slow[SLOW] = SLOW_GAIN
    cases = {
        "all alike": (alike, False),
        "one slow": (one_slow, False),
        "compact": (one_slow, True),
    }
    layers, seconds = {}, {name: [] for name in cases}
    for name, (_, compact) in cases.items():
        layers[name] = DEQLayer(
            cell, solver="picard", adjoint="neumann", tol=1e-3, max_iter=300, compact=compact
        )
    for _ in range(1 + ROUNDS if benchmark.enabled else 1):
        for name, (gain, _) in cases.items():
            seconds[name].append(step(layers[name], x, gain, differentiate))
    medians = {name: statistics.median(taken[1:] or taken) for name, taken in seconds.items()}
    solution = layers["compact"].last_solution
    assert solution is not None
    assert solution.converged.all()
    row = (
        make.__name__,
        "both" if differentiate else "forward",
        str(solution.evaluations),
        f"{solution.sample_evaluations / BATCH:.1f}",
        *(f"{medians[name] / medians['all alike']:.2f}" for name in cases),
    )
    head = ("cell", "mode", "evaluations", "of whole batches", *cases)
    tables.add("one slow sample of 64, relative to none", head, row)
    benchmark.extra_info.update(medians)
    benchmark.pedantic(lambda: step(layers["compact"], x, one_slow, differentiate), rounds=1)
