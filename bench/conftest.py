"""Makes the helpers beside this file importable, and prints the table of all races at the end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Under every import mode and from every folder.
sys.path.insert(0, str(Path(__file__).parent))

from contestants import ENTRIES
from interleave import Race

RACES = pytest.StashKey[dict[tuple[tuple[int, int], str], Race]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RACES] = {}


@pytest.fixture(scope="session")
def races(request: pytest.FixtureRequest) -> dict[tuple[tuple[int, int], str], Race]:
    """Collects what the table shows."""
    return request.config.stash[RACES]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    timed = [race for race in config.stash[RACES].values() if race.medians]
    if not timed:
        return
    write = terminalreporter.write_line
    terminalreporter.section("time relative to torchdeq's fastest solver")
    write("Medians of interleaved rounds at the same verified residual; below 1 is faster. In")
    write("brackets: iterations, worst sample (full: forward+adjoint). torchdeq-simple has no stop")
    write("test: it was told the number of iterations. bare-products solves nothing.")
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > 1.25 * cores:  # a run of its own makes it about 1 per core
        write(f"The machine is busy with other things (load {load:.1f} on {cores} cores), and a")
        write("thread that waits for its core stalls the others: do not trust these numbers.")
    names = [entry.name for entry in ENTRIES]
    upper, lower = zip(*(name.split("-", 1) for name in names), strict=True)
    head = [("", "", "", *upper, "torchdeq's"), ("d x B", "mode", "rounds", *lower, "fastest")]
    rows = [*head, *(_row(race, names) for race in timed)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        write("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _row(race: Race, names: list[str]) -> tuple[str, ...]:
    cells = [_cell(race, name) for name in names]
    fastest = race.reference
    shown = f"{race.medians[fastest] * 1e3:.2f} ms {fastest[9:]}" if fastest else "-"
    return "{} x {}".format(*race.size), race.mode, str(race.rounds), *cells, shown


def _cell(race: Race, name: str) -> str:
    if name not in race.medians:
        return "-"
    ratio = race.ratio(name)
    time = f"{race.medians[name] * 1e3:.2f} ms" if ratio is None else f"{ratio:.2f}"
    return f"{time} ({race.ready[name].iterations})"
