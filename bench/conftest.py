"""Shows or writes the results at the end."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
from general_report import GENERAL, general_sections
from record import load, write_json
from report import Races, report
from tables import Tables

RACES = pytest.StashKey[Races]()
LOAD = pytest.StashKey["float | None"]()
TABLES = pytest.StashKey[Tables]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdeq benchmark")
    group.addoption("--results", help="write the results to this JSON file, and a plot beside it")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RACES] = {}
    config.stash[TABLES] = Tables()
    config.stash[LOAD] = load()
    # pytest-benchmark's own tables compare runs that were not interleaved; -v shows them.
    if hasattr(config.option, "benchmark_quiet") and config.option.verbose < 1:
        config.option.benchmark_quiet = True


@pytest.fixture(scope="session")
def races(request: pytest.FixtureRequest) -> Races:
    """Collects what is shown."""
    return request.config.stash[RACES]


@pytest.fixture(scope="session")
def tables(request: pytest.FixtureRequest) -> Tables:
    """Collects rows of tables that are not times."""
    return request.config.stash[TABLES]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Generator[None, None, None]:
    """After everything else, so that the ratios are what one sees."""
    yield
    for title, lines in config.stash[TABLES].sections():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
    races = config.stash[RACES]
    if not any(race.medians for race in races.values()):
        return
    for title, lines in (*general_sections(races), *report(races)):
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
    if config.option.results:
        path = Path(config.option.results)
        write_json(path, races, config.stash[LOAD])
        drawn = any(group != GENERAL for group, _ in races)
        plotted = _plotted(path) if drawn else "and no plot: it has the affine cells' races"
        terminalreporter.write_line(f"written: {path}, {plotted}")


def _plotted(path: Path) -> str:
    try:
        from plot import plot

        return str(plot(path))
    except ImportError:
        return "and no plot without matplotlib (`pip install 'fastdeq[bench]'`)"
