"""Plots results written by ``record.py``: ``python bench/common/plot.py results.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODES = ("forward", "backward", "full")
LINES = {
    "fastdeq auto": "fastdeq-auto",
    "fastdeq plain": "fastdeq-plain",
    "torchdeq's fastest": "reference",
    "bare products": "bare-products",
}
STYLES = {
    "fastdeq auto": {"color": "tab:blue", "marker": "o"},
    "fastdeq plain": {"color": "tab:cyan", "marker": "s", "linestyle": "--"},
    "torchdeq's fastest": {"color": "tab:orange", "marker": "^"},
    "bare products": {"color": "0.5", "marker": "x", "linestyle": ":"},
}
Race = dict[str, Any]


def plot(source: Path) -> Path:
    """Draws the JSON file ``source`` into a PNG beside it and returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(source.read_text())
    races: list[Race] = [race for race in content["races"] if race["contestants"]]
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), constrained_layout=True)
    peers = [race for race in races if race["group"] == "peers"]
    easy = [race for race in peers if race["problem"]["kind"] == "tanh easy"]
    _draw_ratios(axes[0, 0], easy)
    full = [race for race in easy if race["mode"] == "full"]
    _draw_costs(axes[0, 1], full, _size, "d x B (forward + backward)")
    panels: dict[str, tuple[Callable[[Race], str], str]] = {
        "batch": (lambda race: str(race["problem"]["batch"]), "B at d = 256"),
        "tolerance": (lambda race: f"{race['problem']['tol']:g}", "tolerance at 256 x 64"),
        "threads": (
            lambda race: f"{race['problem']['threads']} at\n{_size(race)}",
            "threads",
        ),
        "straggler": (
            lambda race: f"{race['problem']['inputs']}\n{race['mode']}",
            "one slow sample of 256 at d = 256",
        ),
    }
    for axis, (group, (label, title)) in zip(axes.flat[2:], panels.items(), strict=True):
        _draw_costs(axis, [race for race in races if race["group"] == group], label, title)
    when, cpu = content["date"][:10], content["cpu"]
    figure.suptitle(f"{cpu}, {content['threads']} threads, {when}: medians at a verified residual")
    target = source.with_suffix(".png")
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def _size(race: Race) -> str:
    return f"{race['problem']['d']} x {race['problem']['batch']}"


def _draw_ratios(axis: Any, races: list[Race]) -> None:
    sizes = list(dict.fromkeys(map(_size, races)))
    for mode, color in zip(MODES, ("tab:blue", "tab:green", "tab:red"), strict=True):
        for name, line in (("fastdeq-auto", "-"), ("fastdeq-plain", "--")):
            ratios = {
                _size(race): race["contestants"][name]["ratio"]
                for race in races
                if race["mode"] == mode and name in race["contestants"]
            }
            at = [sizes.index(size) for size in ratios]
            label = f"{name.split('-')[1]}, {mode}"
            axis.plot(at, list(ratios.values()), line, color=color, marker=".", label=label)
    axis.axhline(1, color="0.6", linewidth=1)
    _finish(axis, sizes, "time relative to torchdeq's fastest (tanh, easy)", "ratio")


def _draw_costs(axis: Any, races: list[Race], label: Callable[[Race], str], title: str) -> None:
    for name, entry in LINES.items():
        points = []
        for at, race in enumerate(races):
            found = race["contestants"].get(race["reference"] if entry == "reference" else entry)
            if found:
                points.append((at, found["median_ms"]))
        if points:
            style = dict(STYLES[name])
            if "\n" in label(races[0]):  # categories, not a scale
                style["linestyle"] = "none"
            axis.plot(*zip(*points, strict=True), label=name, **style)
    _finish(axis, [label(race) for race in races], title, "milliseconds")


def _finish(axis: Any, labels: list[str], title: str, unit: str) -> None:
    if not labels:  # no such races in this run
        axis.set_axis_off()
        return
    axis.set_yscale("log")
    axis.set_xticks(range(len(labels)), labels, rotation=30 if len(labels) > 6 else 0, fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.set_ylabel(unit)
    axis.grid(alpha=0.3, which="both")
    if axis.lines:
        axis.legend(fontsize=7)


if __name__ == "__main__":
    print(plot(Path(sys.argv[1])))
