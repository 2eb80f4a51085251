"""The report of the study: one HTML file that holds its pictures and needs no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import pandas as pd

from . import sections
from .criteria import SETTING, Criteria, arranged
from .evaluation import Evaluation
from .findings import Finding, Grid
from .stability import number, octaves, scales
from .style import DPI, SETTINGS, Missing


@dataclass
class Section:
    """A part of the page: heading, sentences, pictures, and why some are missing."""

    title: str
    anchor: str
    intro: str
    findings: list[Finding] = field(default_factory=list)
    pictures: list[dict[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    tables: list[Grid] = field(default_factory=list)


def write_report(
    training: pd.DataFrame,
    initial: pd.DataFrame,
    settings: dict[str, Any],
    machine: dict[str, Any],
    out: Path,
    criteria: Criteria | None = None,
) -> Path:
    """Writes ``out/report.html`` and the pictures in it as ``out/figures/*.png``.

    Args:
        training: one row per training run; may be empty or a part of a study.
        initial: statistics over draws of initial weights; may be empty.
        settings: of the study; ``command``, if given, is shown as the way to repeat it.
        machine: versions, processor, date, as shown.
        out: folder, made if it does not exist.
        criteria: thresholds of stability; None: the defaults.

    Returns:
        The path of the page.
    """
    out = Path(out)
    figures = out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(training, initial, criteria)
    with matplotlib.rc_context(SETTINGS):
        parts = [
            _section(part, title, anchor, intro, figures)
            for title, anchor, intro, part in sections.build(evaluation)
        ]
    lead, rest = parts[0], parts[1:]
    page = _environment().get_template("study.html.j2").render(
        lead=lead,
        sections=rest,
        criteria=evaluation.criteria.describe(),
        scope=sections.scope(evaluation),
        ranges=_range_rows(evaluation),
        cells=_cells(evaluation),
        errors=_errors(evaluation.judged),
        settings=_flat(settings),
        machine=_flat(machine),
        command=str(settings.get("command", "")) or "python -m fastdeq study",
        limits=sections.limitations(evaluation),
    )  # fmt: skip
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("fastdeq.study.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _section(
    items: Iterable[sections.Item],
    title: str,
    anchor: str,
    intro: str,
    folder: Path,
) -> Section:
    section = Section(title, anchor, intro)
    for item in items:
        if isinstance(item, Finding):
            section.findings.append(item)
        elif isinstance(item, Grid):
            section.tables += [item] if item.rows else []
        elif isinstance(item, Missing):
            section.missing.append(item.reason)
        else:
            path = folder / f"{item.name}.png"
            # Laid out once: left to savefig, which draws twice, it takes most of the time.
            item.figure.get_layout_engine().execute(item.figure)
            item.figure.set_layout_engine("none")
            item.figure.savefig(path, dpi=DPI, facecolor="white")
            code = base64.b64encode(path.read_bytes()).decode("ascii")
            width, height = (round(inches * DPI) for inches in item.figure.get_size_inches())
            section.pictures.append(
                {
                    "source": f"data:image/png;base64,{code}",
                    "caption": item.caption,
                    "alt": item.figure.get_suptitle().strip(),
                    "width": str(width),
                    "height": str(height),
                }
            )
    return section


def _range_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The table of ranges: each setting's own cells in the first row of its families."""
    both = evaluation.table()
    learns = evaluation.table("learns")
    rows, previous = [], None
    for row, wide in zip(both.itertuples(), learns.itertuples(), strict=True):
        setting = tuple(getattr(row, k) for k in SETTING)
        rows.append(
            {
                "setting": setting,
                "first": setting != previous,
                "weight": row.weight,
                "lower": "none"
                if row.none
                else ("≤ " if row.at_bottom else "") + number(row.lower),
                "upper": scales(row),
                "octaves": octaves(row),
                "learns": scales(wide),
                "seeds": row.seeds,
            }
        )
        previous = setting
    return rows


def _cells(evaluation: Evaluation) -> dict[str, Any]:
    """Median accuracy and share of stable seeds of every cell, scales as columns."""
    runs = evaluation.judged
    columns = sorted(runs["scale"].unique()) if len(runs) else []
    keys = [*SETTING, "weight"]
    order = [*arranged(runs[keys].drop_duplicates(), keys).itertuples(index=False, name=None)]
    rows = []
    for key, group in runs.groupby(keys, sort=False):
        at = group.groupby("scale").agg(
            accuracy=("test_accuracy", "median"), stable=("stable", "mean")
        )
        shown = [
            (f"{at.accuracy[s]:.1%}" if at.accuracy[s] == at.accuracy[s] else "–", at.stable[s])  # noqa: RUF001
            if s in at.index
            else ("", -1.0)
            for s in columns
        ]
        rows.append({"key": key, "cells": shown})
    rows.sort(key=lambda row: order.index(row["key"]))
    return {"scales": [number(s) for s in columns], "rows": rows}


def _errors(runs: pd.DataFrame) -> list[tuple[str, int]]:
    failed = runs.loc[runs["error"] != "", "error"] if len(runs) else pd.Series(dtype=str)
    return [(str(text), int(count)) for text, count in failed.value_counts().head(10).items()]


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines of ``a.b`` and a value."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{name}.")
        else:
            listed = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            lines.append((f"{prefix}{name}", listed))
    return lines
