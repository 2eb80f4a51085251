"""What the terminal shows at the end: the costs, the products, and last the table of ratios."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from contestants import Counts
from entries import EASY_ENTRIES, HARD_ENTRIES, SCALING_ENTRIES
from interleave import Race

PEERS = "peers"
#: group of races -> what its table says
SCALING = {
    "batch": "against B",
    "tolerance": "against the tolerance",
    "threads": "against the number of threads",
    "straggler": "with one straggler in the batch",
    "structure": "against the structure of W",
}
Races = dict[tuple[str, str], Race]  # by group and a key of its own

_RATIO_NOTE = (
    "Medians of interleaved rounds at the same verified residual; below 1 is faster. The reference",
    "is torchdeq's fastest solver that has a stop test. torchdeq-simple has none: it was told the",
    "number of iterations, and auto/simple compares with it. jaxopt was told the norm of z*.",
    "bare-products solves nothing.",
)


def report(races: Races) -> Iterator[tuple[str, list[str]]]:
    """Titles and lines of the sections."""
    peers = [race for (group, _), race in races.items() if group == PEERS and race.medians]
    left_out = list(_left_out(races.values()))
    if left_out:
        yield "left out", left_out
    sizes = [race for race in peers if race.mode == "full" and race.spec.kind == "tanh easy"]
    if len(sizes) > 1:
        yield "milliseconds, forward + backward, against d", _costs(sizes)
    for name, title in SCALING.items():
        group = [race for (key, _), race in races.items() if key == name and race.medians]
        if group:
            yield f"milliseconds, {title}", _costs(group)
    products = [race for race in peers if race.mode == "full"]
    for hard in (False, True):
        chosen = [race for race in products if race.spec.hard == hard]
        if chosen:
            what = "hard" if hard else "easy"
            yield f"products with W per sample, forward + backward, {what}", _products(chosen, hard)
    if peers:
        lines = [*_RATIO_NOTE, *busy()]
        for hard in (True, False):
            chosen = [race for race in peers if race.spec.hard == hard]
            lines += ["", *_ratios(chosen, hard)] if chosen else []
        yield "time relative to torchdeq's fastest solver", lines


def _left_out(races: Iterable[Race]) -> Iterator[str]:
    where: dict[tuple[str, str], list[str]] = {}
    for race in races:
        for name, reason in race.skipped.items():
            place = f"{race.spec.kind} {race.spec.size}"
            places = where.setdefault((name, reason.split(";")[0]), [])
            if place not in places:
                places.append(place)
    for (name, reason), places in where.items():
        shown = ", ".join(places) if len(places) < 4 else f"{len(places)} problems"
        yield f"{name} ({shown}): {reason}"


def _ratios(races: list[Race], hard: bool) -> list[str]:
    names = [entry.name for entry in (HARD_ENTRIES if hard else EASY_ENTRIES)]
    rows = [head(("problem", "d x B", "mode"), [*names, "auto/simple", "torchdeq's fastest"])]
    for race in races:
        best = race.reference
        fastest = f"{race.medians[best] * 1e3:.2f} ms {best.split('-', 1)[1]}" if best else "-"
        against_simple = race.ratio("fastdeq-auto", "torchdeq-simple")
        ratios = [number(race.ratio(name)) for name in names]
        cells = [race.spec.kind, race.spec.size, race.mode, *ratios]
        rows.append(((*cells, number(against_simple), fastest),))
    return table(rows)


def _costs(races: list[Race]) -> list[str]:
    shown = [entry.name for entry in SCALING_ENTRIES if any(entry.name in r.medians for r in races)]
    fixed = ("W", "scale", "d x B", "tol", "threads", "inputs", "mode")
    rows = [head(fixed, [*shown, "auto ratio"])]
    for race in races:
        spec = race.spec
        cells = [
            spec.activation,
            spec.weight,
            f"{spec.scale:g}",
            spec.size,
            f"{spec.tol:g}",
            str(spec.threads or "all"),
            spec.inputs,
            race.mode,
        ]
        times = [number(race.medians.get(name), 1e3, 3) for name in shown]
        rows.append(((*cells, *times, number(race.ratio("fastdeq-auto"))),))
    return table(rows)


def _products(races: list[Race], hard: bool) -> list[str]:
    names = [entry.name for entry in (HARD_ENTRIES if hard else EASY_ENTRIES)]
    names = [name for name in names if name != "bare-products"]
    rows = [head(("problem", "d x B"), names)]
    for race in races:
        counts = [_count(race.products.get(name)) for name in names]
        rows.append(((race.spec.kind, race.spec.size, *counts),))
    return table(rows)


def _count(counts: Counts | None) -> str:
    if counts is None:
        return "-"
    return "+".join("?" if count is None else f"{count:.4g}" for count in counts)


def number(value: float | None, factor: float = 1.0, digits: int = 2) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


Row = tuple[tuple[str, ...], ...]  # one or two lines


def head(fixed: Iterable[str], names: Iterable[str]) -> Row:
    halves = [name.replace(" ", "-").partition("-") for name in names]
    upper, lower = [half[0] for half in halves], [half[2] for half in halves]
    return (*("" for _ in fixed), *upper), (*fixed, *lower)


def table(rows: list[Row]) -> list[str]:
    """Right-aligned lines; columns in which no row but the head has anything are left out."""
    body = [line for row in rows[1:] for line in row]
    lines = [*rows[0], *body]
    kept = [i for i in range(len(lines[0])) if any(line[i] not in "-" for line in body)]
    widths = {i: max(len(line[i]) for line in lines) for i in kept}
    return ["  ".join(line[i].rjust(widths[i]) for i in kept) for line in lines]


def busy() -> Iterator[str]:
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > 1.25 * cores:  # a run of its own makes it about 1 per core
        yield f"The machine is busy with other things (load {load:.1f} on {cores} cores), and a"
        yield "thread that waits for its core stalls the others: do not trust these numbers."
