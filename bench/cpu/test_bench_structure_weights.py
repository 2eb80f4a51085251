"""What orthogonality costs: the map alone against PyTorch's three, and a whole training step.

Everybody runs in turns in one process, in a new random order each round; the numbers are medians,
and ratios are ratios of medians. The parameter moves before every run, as in training, so that no
cached factorisation is timed. ``pytest bench/ --benchmark-only -k structure``.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from report import table
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastdeq import AffineCell, DEQLayer, Orthogonal

SIZES = (128, 512, 1024)
MAPS = ("fastdeq", "householder", "matrix_exp", "cayley")
FEATURES, BATCH, SCALE = 512, 128, 0.9
OPTIMIZERS = {"SGD": (torch.optim.SGD, 0.1), "Adam": (torch.optim.Adam, 1e-3)}
TARGET = 1.5  # a training step with orthogonal weights, in steps with dense ones
SECONDS = 6.0  # per race
MIN_ROUNDS, MAX_ROUNDS = 5, 300


class Contestant(NamedTuple):
    """``prepare`` is not timed, ``run`` is; ``note`` is asked at the end."""

    prepare: Callable[[], Any]
    run: Callable[[], Any]
    note: Callable[[], str]


def _orthogonal(name: str, d: int) -> Contestant:
    """W and the gradient of its parameter, from a parameter near its start."""
    if name == "fastdeq":
        module: nn.Module = Orthogonal(d, 1.0)
        weight: Callable[[], Tensor] = module
    else:
        linear = nn.Linear(d, d, bias=False)
        module = parametrizations.orthogonal(linear, orthogonal_map=name)
        weight = lambda: linear.weight  # noqa: E731
    (raw,) = module.parameters()
    start, g = raw.detach().clone(), torch.randn(d, d)

    def prepare() -> None:
        noise = torch.randn(d, d).mul_(0.1 / d**0.5)  # of 2-norm 0.2: a few steps of training
        if name == "householder":
            noise.tril_(-1)  # what it uses; signs are on its diagonal
        with torch.no_grad():
            raw.copy_(start).add_(noise)
        raw.grad = None

    def run() -> None:
        weight().backward(g)

    def note() -> str:
        w = weight().detach().double()
        return f"{(w.T @ w - torch.eye(d)).abs().max().item():.0e}"

    return Contestant(prepare, run, note)


def _training(family: str, optimizer: str) -> Contestant:
    """Layer forward, loss, backward and the optimiser's step."""
    torch.manual_seed(0)
    layer = DEQLayer(AffineCell(FEATURES, FEATURES, weight=family, scale=SCALE))
    kind, rate = OPTIMIZERS[optimizer]
    steps = kind(layer.parameters(), lr=rate)
    x, y = torch.randn(BATCH, FEATURES), torch.tanh(torch.randn(BATCH, FEATURES))

    def run() -> None:
        steps.zero_grad()
        (layer(x) - y).square().sum(1).mean().backward()
        steps.step()

    def note() -> str:
        solutions = layer.last_solution, layer.last_adjoint_solution
        return "+".join(f"{s.iterations.float().mean().item():.0f}" for s in solutions if s)

    return Contestant(run, run, note)


class Result(NamedTuple):
    """Median seconds and what else there is to say, by contestant."""

    medians: dict[str, float]
    notes: dict[str, str]
    rounds: int


@cache
def race(kind: str, of: int | str) -> Result:
    """Runs all contestants of one race in turns; once per arguments."""
    names = MAPS if kind == "map" else ("dense", "orthogonal")
    make = _orthogonal if kind == "map" else _training
    contestants = {name: make(name, of) for name in names}  # type: ignore[arg-type]
    order, rounds = list(names), 0
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + SECONDS
    gc.collect()
    gc.disable()
    try:
        while rounds < MAX_ROUNDS and (rounds <= MIN_ROUNDS or time.perf_counter() < end):
            random.Random(rounds).shuffle(order)
            for name in order:
                contestants[name].prepare()
                begin = time.perf_counter()
                contestants[name].run()
                times[name].append(time.perf_counter() - begin)
            gc.collect(0)
            rounds += 1
    finally:
        gc.enable()
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    return Result(medians, {name: c.note() for name, c in contestants.items()}, rounds - 1)


class Summary:
    """Prints the tables at the end: a plugin for this run."""

    def __init__(self) -> None:
        self.results: dict[tuple[str, int | str], Result] = {}

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for title, lines in self._sections():
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)

    def _sections(self) -> Iterator[tuple[str, list[str]]]:
        maps = {of: result for (kind, of), result in self.results.items() if kind == "map"}
        if maps:
            head = (("", *("" for _ in MAPS), "best peer", *("" for _ in MAPS)),)
            head += (("d", *MAPS, "/ fastdeq", *(f"|QQ-I| {name}" for name in MAPS)),)
            rows = [head[0:1] and (head[0], head[1])]
            for d, (medians, notes, _) in maps.items():
                peers = min(medians[name] for name in MAPS[1:]) / medians["fastdeq"]
                cells = (str(d), *(f"{medians[name] * 1e3:.2f}" for name in MAPS))
                rows.append(((*cells, f"{peers:.2f}", *(notes[name] for name in MAPS)),))
            yield "milliseconds, an orthogonal d x d matrix forward + backward", table(rows)
        steps = {of: result for (kind, of), result in self.results.items() if kind == "step"}
        if steps:
            rows = [(("", "", "", "", "orthogonal", "iterations,", ""),)]
            rows[0] += (("optimizer", "d x B", "dense", "orthogonal", "/ dense", "dense", "orth."),)
            for name, (medians, notes, _) in steps.items():
                dense, orthogonal = medians["dense"], medians["orthogonal"]
                cells = (name, f"{FEATURES}x{BATCH}", f"{dense * 1e3:.2f}")
                ratio = f"{orthogonal / dense:.2f}"
                iterations = notes["dense"], notes["orthogonal"]
                rows.append(((*cells, f"{orthogonal * 1e3:.2f}", ratio, *iterations),))
            title = f"milliseconds, one training step (target: orthogonal / dense <= {TARGET})"
            yield title, table(rows)


@pytest.fixture(scope="session")
def summary(request: pytest.FixtureRequest) -> Summary:
    plugin = Summary()
    request.config.pluginmanager.register(plugin)
    return plugin


CASES = [
    *(pytest.param("map", d, name, id=f"map-{d}-{name}") for d in SIZES for name in MAPS),
    *(
        pytest.param("step", optimizer, family, id=f"step-{optimizer}-{family}")
        for optimizer in OPTIMIZERS
        for family in ("dense", "orthogonal")
    ),
]


@pytest.mark.timeout(600)  # the first contestant of a race waits for all of it
@pytest.mark.parametrize(("kind", "of", "name"), CASES)
def test_bench_structure_weights(benchmark, summary, kind, of, name):
    contestant = (_orthogonal if kind == "map" else _training)(name, of)
    contestant.prepare()
    if benchmark.enabled:
        result = summary.results[kind, of] = race(kind, of)
        benchmark.extra_info.update(
            interleaved_median_ms=result.medians[name] * 1e3,
            rounds=result.rounds,
            note=result.notes[name],
            threads=torch.get_num_threads(),
        )
    benchmark.group = f"structure {kind} {of}"
    benchmark.pedantic(contestant.run, setup=contestant.prepare, rounds=3)
