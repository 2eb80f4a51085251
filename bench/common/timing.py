"""One test of a contestant in a race, for the files that say which races there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interleave import race, threads_of
from problems import Spec
from report import Races

_ROUNDS, _LONG = 5, 0.02


def bench(
    benchmark: Any,
    races: Races,
    group: str,
    key: str,
    spec: Spec,
    mode: str,
    name: str,
    scaling: bool = False,
) -> None:
    """Runs the race where it has not been, and lets pytest-benchmark time one contestant again.

    The benchmark's own numbers are taken one contestant after another, so they compare less well.
    """
    result = race(spec, mode, benchmark.enabled, scaling)
    races[group, key] = result
    if name in result.skipped:
        pytest.skip(result.skipped[name].partition(";")[0])
    benchmark.group = f"{group} {key}"
    benchmark.extra_info.update(
        result.facts[name],
        d=spec.d,
        B=spec.batch,
        iterations=result.iterations[name],
        products=result.products[name],
        torch=torch.__version__,
        threads=spec.threads or torch.get_num_threads(),
    )
    rounds = 1
    if benchmark.enabled:
        median = result.medians[name]
        rounds = _ROUNDS if median < _LONG else 1
        benchmark.extra_info.update(
            interleaved_median_ms=median * 1e3,
            ratio_to_torchdeq_fastest=result.ratio(name),
            torchdeq_fastest=result.reference,
        )
    with threads_of(spec):
        benchmark.pedantic(result.runs[name], rounds=rounds, warmup_rounds=int(rounds > 1))
