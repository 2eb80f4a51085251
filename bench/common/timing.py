"""One test of a contestant in a race, for the files that say which races there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interleave import Race, race, threads_of
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
    benchmark.extra_info.update(d=spec.d, B=spec.batch)
    time_again(benchmark, races, group, key, result, name)


def time_again(benchmark: Any, races: Races, group: str, key: str, result: Race, name: str) -> None:
    """Puts a race among those that are shown, and lets pytest-benchmark time one contestant."""
    races[group, key] = result
    if name in result.skipped:
        pytest.skip(result.skipped[name].partition(";")[0])
    benchmark.group = f"{group} {key}"
    benchmark.extra_info.update(
        result.facts[name],
        iterations=result.iterations[name],
        products=result.products[name],
        torch=torch.__version__,
        threads=result.spec.threads or torch.get_num_threads(),
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
    with threads_of(result.spec):
        benchmark.pedantic(result.runs[name], rounds=rounds, warmup_rounds=int(rounds > 1))
