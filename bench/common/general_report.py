"""Tables of the races around general cells, for the terminal and, from the JSON, for the README.

``python bench/common/general_report.py bench/results/general.json`` prints Markdown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from general_race import BARE, NAMES
from record import race_record
from report import Races, head, number, table

GENERAL = "general"
_MODES = {"forward": "forward", "backward": "backward", "full": "both"}
_NOTE = (
    "Medians of interleaved rounds at the same verified residual; below 1 is faster. The reference",
    "is torchdeq's fastest solver that has a stop test. torchdeq-simple has none: it was told the",
    "number of iterations. tutorial-anderson is the loop of the DEQ tutorial in plain PyTorch.",
    f"{BARE} solves nothing: the calls and products that fastdeq-auto makes.",
)

_STEPS = ("calls", "products")  # shown alone

Record = dict[str, Any]  # of a race, as in the JSON


def general_sections(races: Races) -> Iterator[tuple[str, list[str]]]:
    """Titles and lines for the terminal; nothing where no such race has run."""
    records = [
        race_record(group, key, race)
        for (group, key), race in races.items()
        if group == GENERAL and race.medians
    ]
    if not records:
        return
    yield "general cells: evaluations+passes of a gradient, whole batch", _counts(records)
    yield "general cells: microseconds per evaluation or product beyond its own", _costs(records)
    yield "general cells: time relative to torchdeq's fastest solver", _ratios(records)


def _titles(record: Record) -> tuple[str, str, str]:
    shape = "x".join(map(str, record["problem"]["shape"]))
    return record["problem"]["kind"], shape, _MODES[record["mode"]]


def _of(record: Record, name: str, key: str) -> Any:
    return record["contestants"].get(name, {}).get(key)


def _counted(record: Record, name: str) -> str:
    counts = _of(record, name, "products")
    return "-" if counts is None else "+".join(map(str, counts))


def _counts(records: list[Record]) -> list[str]:
    rows = [head(("cell", "size", "mode"), NAMES)]
    rows += [((*_titles(r), *(_counted(r, name) for name in NAMES)),) for r in records]
    return table(rows)


def _costs(records: list[Record]) -> list[str]:
    rows = [head(("cell", "size", "mode"), (*NAMES[:-1], "one call", "one product"))]
    for record in records:
        overheads = [number(_of(record, name, "overhead_us"), digits=0) for name in NAMES[:-1]]
        single = [number(_of(record, BARE, f"{kind}_us"), digits=0) for kind in _STEPS]
        rows.append(((*_titles(record), *overheads, *single),))
    return table(rows)


def _ratios(records: list[Record]) -> list[str]:
    rows = [head(("cell", "size", "mode"), (*NAMES, "torchdeq's fastest"))]
    for record in records:
        ratios = [number(_of(record, name, "ratio")) for name in NAMES]
        rows.append(((*_titles(record), *ratios, _fastest(record)),))
    return [*_NOTE, "", *table(rows)]


def _fastest(record: Record) -> str:
    name = record["reference"]
    if name is None:
        return "-"
    return f"{_of(record, name, 'median_ms'):.3g} ms {name.partition('-')[2]}"


_COLUMNS = {
    "fastdeq": "fastdeq-auto",
    "fastdeq, plain": "fastdeq-plain",
    "tutorial's loop": "tutorial-anderson",
    "bare calls": BARE,
}


def markdown(content: dict[str, Any]) -> str:
    """Two tables, ratios and overheads, of the JSON that ``record.write_json`` wrote."""
    records = [r for r in content["races"] if r["group"] == GENERAL and r["contestants"]]
    ratios = [["cell", "mode", "torchdeq's fastest", *_COLUMNS]]
    costs = [["cell, both", "one call", "one product"]]
    costs[0] += [f"{title}: count, overhead" for title in ("fastdeq", "fastdeq, plain")]
    costs[0] += ["torchdeq's fastest: count, overhead", "tutorial's loop: count, overhead"]
    for record in records:
        kind, shape, mode = _titles(record)
        numbers = [number(_of(record, name, "ratio")) for name in _COLUMNS.values()]
        ratios.append([f"{kind} {shape}", mode, _fastest(record), *numbers])
        if mode != "both":
            continue
        names = "fastdeq-auto", "fastdeq-plain", record["reference"], "tutorial-anderson"
        costs.append(
            [f"{kind} {shape}"]
            + [f"{number(_of(record, BARE, f'{step}_us'), digits=0)} us" for step in _STEPS]
            + [_counts_and_overhead(record, name) for name in names]
        )
    when = f"{content['cpu']}, {content['threads']} threads, torch {content['versions']['torch']}"
    return "\n\n".join((f"{when}, {content['date'][:10]}", _pipes(ratios), _pipes(costs))) + "\n"


def _counts_and_overhead(record: Record, name: str | None) -> str:
    overhead = _of(record, name or "", "overhead_us")
    return "-" if overhead is None else f"{_counted(record, name or '')}, {overhead:.0f} us"


def _pipes(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
