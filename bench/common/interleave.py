"""Fair timing: everybody at the same verified residual, in turns, in one process.

First each contestant gets the loosest settings that reach the tolerance in float64, searched
outside any timed region. Then all of them run in rounds, in a new random order each round, so that
whatever else the machine does meanwhile meets everybody alike. Ratios are ratios of medians.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from contestants import Counts
from entries import entries_of, is_reference
from problems import Spec
from verify import NotReachedError, prepare

MODES = ("forward", "backward", "full")
SECONDS = 3.0  # per race, half of it for warm-up runs
SECONDS_SCALING = 1.5
MIN_ROUNDS, MAX_ROUNDS = 3, 200
_LONG = 0.05  # seconds from which a run need not be preceded by another to warm the caches
# A contestant that takes more than both in one run is left out of a race.
_DROP_SECONDS, _DROP_RATIO = 3.0, 20.0


@dataclass
class Race:
    """Everybody on one problem in one mode."""

    spec: Spec
    mode: str
    runs: dict[str, Callable[[], Any]] = field(default_factory=dict)
    iterations: dict[str, Counts] = field(default_factory=dict)
    products: dict[str, Counts] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    medians: dict[str, float] = field(default_factory=dict)  # seconds
    rounds: int = 0

    @property
    def reference(self) -> str | None:
        """torchdeq's fastest solver with a stop test here; None where none ran."""
        names = filter(is_reference, self.medians)
        return min(names, key=self.medians.__getitem__, default=None)

    def ratio(self, name: str, to: str | None = None) -> float | None:
        """Time relative to ``to``, or to the reference: below 1 is faster."""
        to = to or self.reference
        if name not in self.medians or to not in self.medians:
            return None
        return self.medians[name] / self.medians[to]


@contextlib.contextmanager
def threads_of(spec: Spec) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(spec.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def race(spec: Spec, mode: str, timed: bool = True, scaling: bool = False) -> Race:
    """Verifies everybody and, where ``timed``, runs the rounds; once per arguments."""
    result = Race(spec, mode)
    with threads_of(spec):
        for entry in entries_of(spec, scaling):
            try:
                ready = prepare(entry, spec, mode)
            except NotReachedError as reason:
                result.skipped[entry.name] = str(reason)
                continue
            result.runs[entry.name], result.facts[entry.name] = ready.run, ready.facts
            result.iterations[entry.name] = ready.iterations
            result.products[entry.name] = ready.products
        if timed:
            run_rounds(result, SECONDS_SCALING if scaling else SECONDS)
    return result


def _time(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _drop_slow(result: Race) -> set[str]:
    """Leaves out who would hold up the race; returns who takes long."""
    once = {name: _time(run) for name, run in result.runs.items()}
    best = min((seconds for name, seconds in once.items() if is_reference(name)), default=None)
    for name, seconds in once.items():
        if best and seconds > _DROP_SECONDS and seconds > _DROP_RATIO * best:
            del result.runs[name]
            result.skipped[name] = (
                f"left out: one run took {seconds:.1f} s, {seconds / best:.0f} times as long as "
                "torchdeq's fastest solver"
            )
    return {name for name, seconds in once.items() if seconds > _LONG}


def run_rounds(result: Race, seconds: float) -> None:
    """Times ``result.runs`` in turns for about ``seconds`` and fills in ``result.medians``."""
    long = _drop_slow(result)
    order = list(result.runs)
    times: dict[str, list[float]] = {name: [] for name in order}
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        while result.rounds < MAX_ROUNDS:
            if result.rounds >= MIN_ROUNDS and time.perf_counter() > end:
                break
            shuffle(order)
            for name in order:
                if name not in long:
                    result.runs[name]()  # brings the contestant's data back into the caches
                times[name].append(_time(result.runs[name]))
            gc.collect(0)
            result.rounds += 1
    finally:
        gc.enable()
    result.medians = {name: statistics.median(values) for name, values in times.items()}
