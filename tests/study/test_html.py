"""The page of the study: complete, self-contained, safe, and there for any part of a study."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import study_tables

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from fastdeq.study.report import html
from fastdeq.study.report.html import write_report

NOTHING = pd.DataFrame()


class Page(HTMLParser):
    """What is on a page: links, images, balance of tags."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.links, self.text = [], [], [], []
        self.feed(text)
        assert self.tags == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.tags.append(tag)
        if tag == "img":
            self.images.append(attributes)
        self.links += [attributes[n] for n in ("href", "src", "action") if n in attributes]

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def report(folder, training, initial=NOTHING, settings=None, machine=None):
    path = write_report(training, initial, settings or {}, machine or {}, folder)
    text = path.read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture
def coarse(monkeypatch):
    """Fewer pixels, where no picture is looked at."""
    monkeypatch.setattr(html, "DPI", 20)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    training = study_tables.training(solvers=("picard", "auto"), spread=0.5, details=True)
    settings = {"command": "python -m fastdeq study --out x", "seeds": 5, "images": {"tol": 1e-4}}
    folder = tmp_path_factory.mktemp("report")
    return (*report(folder, training, study_tables.initial(), settings, {"cpu": "two"}), folder)


def test_everything_is_on_the_page(full):
    page, text, folder = full
    files = sorted(p.stem for p in (folder / "figures").iterdir())
    assert len(files) == len(page.images) >= 12
    for name in ("ranges", "map_digits_implicit", "traces_digits", "lengths", "means_identity"):
        assert name in files
    body = " ".join(page.text)
    assert "the data support a broader range" in body
    assert "python -m fastdeq study --out x" in body
    assert "images.tol" in body
    # What decides stands before the first picture: sentences, and the table that counts.
    lead = text[: text.index("<img")]
    assert "the stable range is broader in 4, narrower in 0, not different in 0" in lead
    assert "would still be decided by chance" in lead
    assert '<th scope="col">narrower</th>' in lead
    assert lead.count("<li") == 5


def test_the_page_needs_nothing_else(full):
    page, text, _ = full
    for link in page.links:
        assert link.startswith(("#", "data:image/png;base64,")), link[:60]
    assert not re.search(r"https?://|@import|url\(|<script", text)


def test_images_can_be_read_aloud_and_keep_their_shape(full):
    page, _, _ = full
    for image in page.images:
        assert image["alt"]
        assert 800 < int(image["width"]) < 1000
        assert int(image["height"]) > 100


def test_text_is_escaped(tmp_path, coarse):
    runs = study_tables.training(seeds=[0], scales=(0.5, 1.0))
    runs.loc[0, "error"] = "<script>alert('x')</script> & so on"
    runs["task"] = "digits<b>"
    _, text = report(tmp_path, runs, settings={"a": "<i>", "command": "x && <y>"})
    assert "<script" not in text
    assert "digits<b>" not in text
    assert "&lt;script&gt;" in text
    assert "x &amp;&amp; &lt;y&gt;" in text


PARTS = {
    "one run": study_tables.training({"dense": 0.0}, scales=(0.5,), seeds=[0]),
    "dense alone": study_tables.training({"dense": 0.0}),
    "one seed": study_tables.training(seeds=[0], regimes=("initialised",), details=True),
    "kept alone": study_tables.training({"orthogonal": 0.0, "symmetric": 0.0}, regimes=("kept",)),
    "characters": study_tables.training(
        tasks=("characters",), activations=("gelu",), solvers=("auto",)
    ),
    "nothing stable": study_tables.training({"dense": -9.0, "orthogonal": -9.0}),
    "two gradients": study_tables.training(gradients=("implicit", "phantom"), scales=(0.5, 1, 2)),
    "nothing": study_tables.training().iloc[:0],
    "no columns": NOTHING,
    "few columns": study_tables.training()[
        ["task", "weight", "scale", "seed", "activation", "solver", "gradient", "test_accuracy"]
    ],
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_study_has_a_page(part, tmp_path, coarse):
    page, text = report(tmp_path, PARTS[part])
    assert "There are no draws of initial weights" in text
    assert ("There are no training runs" in text) == (part in ("nothing", "no columns"))
    assert bool(page.images) == (part not in ("nothing", "no columns"))


def test_draws_alone_have_a_page(tmp_path, coarse):
    page, _ = report(tmp_path, NOTHING, study_tables.initial())
    assert len(page.images) == 4


def test_runs_that_failed_are_shown_and_spoil_nothing(tmp_path, coarse):
    runs = study_tables.training(scales=(0.5, 2.0), details=True, regimes=("initialised",))
    measured = [c for c in runs if c.startswith(("test_", "train_", "forward_", "backward_"))]
    failed = runs.weight == "symmetric"
    runs.loc[failed, measured] = np.nan
    runs.loc[failed, "error"] = "RuntimeError: out of luck"
    for name in [c for c in runs if c.startswith(("trace_", "weight_", "jacobian_"))]:
        runs[name] = runs[name].where(~failed, None)
    page, text = report(tmp_path, runs)
    assert "out of luck" in text
    assert "runs ended with an error" in text
    assert "symmetric weights train stably at no scale" in text
    assert page.images


def test_a_whole_study_of_nan_has_a_page(tmp_path, coarse):
    runs = study_tables.training()
    runs[["test_accuracy", "test_loss", "train_loss", "forward_converged"]] = np.nan
    _, text = report(tmp_path, runs)
    assert "No run on digits has a finite test accuracy" in text
