"""Colours of the report can be read on its backgrounds, by day and by night."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

TEMPLATE = files("fastdeq.study.report").joinpath("templates/study.html.j2").read_text("utf-8")
STYLE = TEMPLATE[TEMPLATE.index("<style>") : TEMPLATE.index("</style>")]
ROOTS = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
BLOCKS = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in ROOTS]


def luminance(colour: str) -> float:
    digits = colour[1:]
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(scheme):
    """4.5 for text of this size (WCAG 2.2, criterion 1.4.3)."""
    colours = BLOCKS[scheme]
    text = {"ink", "soft", "link", "good", "bad", "even", "dense", "orthogonal", "symmetric"}
    assert text < set(colours)
    for name in text:
        for background in ("page", "card"):
            assert contrast(colours[name], colours[background]) >= 4.5, (name, background)


def test_all_text_colours_follow_the_scheme():
    rules = re.sub(r":root \{.*?\}", "", STYLE, flags=re.S)
    assert not re.search(r"[{;]\s*color:\s*#", rules)


def test_a_page_fits_a_phone():
    assert 'name="viewport"' in TEMPLATE
    assert TEMPLATE.count("<table>") == TEMPLATE.count('<div class="scroll"><table>')
    assert "max-width: 640px" in STYLE
