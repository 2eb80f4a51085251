"""Results of ``make gpu`` as text: ``python bench/gpu/gpu_report.py results.json``.

The table of ratios comes last.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# As a script it finds what the benchmarks share.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from report import table

Content = dict[str, Any]

_RATIOS = (
    "Forward + backward at the same verified residual; medians of interleaved rounds, between CUDA",
    "events. Time relative to the reference, below 1 is faster.",
)
_SOLVES = (
    "The forward solve alone, milliseconds. Floors: gpu_floor.py. latency: one call from an",
    "idle device, with the host's part; queued: per call of a full queue, without it.",
)
_CALLS = (
    "Waits of the host for the device / launches, of a forward solve, then of forward + backward;",
    "MiB beyond the inputs. The failure policy of a layer waits once per solve, to see the status.",
)


def lines(content: Content) -> Iterator[str]:
    """The whole report."""
    note = content.get("note")
    yield from _machine(content)
    if note:
        yield f"*** {note} ***"
    problems: dict[str, Any] = content["problems"]
    sections = (
        ("left out", _left_out(content)),
        ("waits and launches", _section(_CALLS, _counts(problems))),
        ("the solve against its floor", _section(_SOLVES, _solves(problems))),
        ("milliseconds", _times(problems)),
        ("time relative to the reference", _section(_RATIOS, [*_stand_in(problems)])),
    )
    for title, found in sections:
        body = list(found)
        if body:
            yield from ("", f"--- {title} ---", *body)
    yield from _ratios(problems)
    if note:
        yield f"*** {note} ***"


def _machine(content: Content) -> Iterator[str]:
    machine = content["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    driver = machine.get("smi", {}).get("driver_version", "-")
    yield f"{machine['device']}, driver {driver}, CUDA {machine['cuda']}, {versions}"
    yield f"{machine['date']}, commit {machine['commit'] or 'unknown'}"
    for name, phase in content.get("phases", {}).items():
        yield f"{name}: {phase['status']} in {phase['seconds']:.0f} s. {phase['detail']}".rstrip()
    if "ceilings" in content:
        top = content["ceilings"]
        yield (
            f"measured ceilings: copy {top['bandwidth'] / 1e12:.3g} TB/s read + written, products "
            f"{top['float32'] / 1e12:.3g} TFLOP/s float32, {top['bfloat16'] / 1e12:.3g} bfloat16"
        )
    for skipped in content["skipped"]:
        yield f"SKIPPED: {skipped}"


def _section(note: tuple[str, ...], body: list[str]) -> list[str]:
    return [*note, *body] if body else []


def _left_out(content: Content) -> Iterator[str]:
    where: dict[tuple[str, str], list[str]] = {}
    for section, problem in content["problems"].items():
        for name, reason in problem["left_out"].items():
            where.setdefault((name, reason), []).append(section)
        for name, solve in problem["solves"].items():
            if "left_out" in solve:
                where.setdefault((f"{name}, alone", solve["left_out"]), []).append(section)
    for (name, reason), sections in where.items():
        shown = ", ".join(sections) if len(sections) < 3 else f"{len(sections)} problems"
        yield f"{name} ({shown}): {reason}"


def _names(problems: dict[str, Any]) -> list[str]:
    """Everybody who took part anywhere; fastdeq first, then in the order of appearance."""
    names = list(dict.fromkeys(n for p in problems.values() for n in p["contestants"]))
    return sorted(names, key=lambda name: not name.startswith("fastdeq"))


def _head(fixed: tuple[str, ...], names: list[str]) -> tuple[tuple[str, ...], ...]:
    upper, middle, lower = [], [], []
    for name in names:
        first, _, rest = name.partition("-")
        second, _, third = rest.partition("-") if first == "fastdeq" else (rest, "", "")
        upper.append(first)
        middle.append(second)
        lower.append(third)
    blank = tuple("" for _ in fixed)
    return (*blank, *upper), (*blank, *middle), (*fixed, *lower)


def _rows(problems: dict[str, Any], cell: Any, last: Any = None) -> list[str]:
    """A line per problem with ``cell(contestant, problem)`` for everybody."""
    names = _names(problems)
    if not names:
        return []
    rows = [_head(("problem",), [*names, *([] if last is None else [last[0]])])]
    if not any(cell(c, p) for p in problems.values() for c in p["contestants"].values()):
        return []
    for section, problem in problems.items():
        found = problem["contestants"]
        cells = [cell(found[n], problem) if n in found else "-" for n in names]
        rows.append(((section, *cells, *([] if last is None else [last[1](problem)])),))
    return table(rows)


def _counts(problems: dict[str, Any]) -> list[str]:
    def cell(found: Content, _: Content) -> str:
        forward, full, peak = found["forward_calls"], found["calls"], found["peak_mib"]
        if not full["launches"]:  # nothing is launched on a CPU, or the profiler saw nothing
            return "" if peak is None else f"? ? {peak:.0f}"
        text = f"{forward['waits']}/{forward['launches']} {full['waits']}/{full['launches']}"
        return f"{text} {peak:.0f}"

    return _rows(problems, cell)


def _times(problems: dict[str, Any]) -> list[str]:
    return _rows(
        problems,
        lambda found, _: f"{found['median_ms']:.3g}",
        ("fastdeq-auto-engines", _engines),
    )


def _engines(problem: Content) -> str:
    taken = problem["contestants"].get("fastdeq-auto", {}).get("engines", [])
    return " + ".join(name.split()[-1] for name in taken) or "-"


def _stand_in(problems: dict[str, Any]) -> Iterator[str]:
    references = {p["reference"] for p in problems.values()}
    if any(name and name.startswith("torchdeq") for name in references):
        yield "The reference is torchdeq's fastest solver there."
    if "eager-loop" in references:
        yield "torchdeq is not there, or fails: the eager loop stands in for it as the reference."
    if None in references:
        yield "Where there is no reference, nobody but fastdeq reaches the tolerance."


def _ratios(problems: dict[str, Any]) -> list[str]:
    def cell(found: Content, problem: Content) -> str:
        reference = problem["contestants"].get(problem["reference"])
        return f"{found['median_ms'] / reference['median_ms']:.3f}" if reference else "-"

    def reference(problem: Content) -> str:
        name = problem["reference"]
        return f"{name} {problem['contestants'][name]['median_ms']:.3g} ms" if name else "none"

    return _rows(problems, cell, ("reference", reference))


def _solves(problems: dict[str, Any]) -> list[str]:
    head = ("problem", "engine", "products", "worst", "latency", "queued")
    rows = [((*head, "floor f32", "floor bf16", "over f32"),)]
    for section, problem in problems.items():
        for name, solve in problem["solves"].items():
            if "left_out" in solve:
                continue
            floor, best = solve["floor_ms"], solve.get("queued_ms", solve["latency_ms"])
            numbers = (solve["latency_ms"], solve.get("queued_ms"), *floor.values())
            shown = ("-" if n is None else f"{n:.3g}" for n in numbers)
            mean = solve["products"] / problem["problem"]["batch"]
            counts = (f"{mean:.1f}", str(solve["worst"]))
            rows.append(((section, name, *counts, *shown, f"{best / floor['float32']:.1f}"),))
    return table(rows) if len(rows) > 1 else []


if __name__ == "__main__":
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text()))))
