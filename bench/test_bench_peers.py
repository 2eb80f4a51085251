"""fastdeq, torchdeq and a plain loop on the same equilibrium, at the same verified residual.

    forward     the equilibrium, without a graph
    backward    gradients of W, U, b and x, from a state with a graph
    full        a state with a graph, and its gradients

``pytest bench/ --benchmark-only`` ends with a table of ratios. Those come from interleaved rounds
(``interleave.py``); the benchmark's own numbers are taken one contestant after another, so they
compare less well.
"""

from __future__ import annotations

import pytest
import torch
from contestants import ENTRIES
from interleave import MODES, race
from problems import SIZES

CASES = [
    pytest.param(size, mode, entry.name, id="{}x{}-{}-{}".format(*size, mode, entry.name))
    for size in SIZES
    for mode in MODES
    for entry in ENTRIES
    if mode in entry.modes
]


@pytest.mark.parametrize(("size", "mode", "name"), CASES)
def test_bench_peers(benchmark, races, size, mode, name):
    result = race(size, mode, benchmark.enabled)
    races[size, mode] = result
    if name in result.skipped:
        pytest.skip(result.skipped[name])
    ready = result.ready[name]
    benchmark.group = "{} x {} {}".format(*size, mode)
    benchmark.extra_info.update(
        ready.facts,
        d=size[0],
        B=size[1],
        iterations=ready.iterations,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    rounds = 1
    if benchmark.enabled:
        median = result.medians[name]
        rounds = min(50, max(2, round(0.3 / median)))
        benchmark.extra_info.update(
            interleaved_median_ms=median * 1e3,
            ratio_to_torchdeq_fastest=result.ratio(name),
            torchdeq_fastest=result.reference,
        )
    benchmark.pedantic(ready.run, rounds=rounds, warmup_rounds=1)
