"""Characters of source text: stretches of the Python standard library, which is always at hand."""

from __future__ import annotations

import random
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .data import Dataset

ASCII = 128


@cache
def library(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes ``(length,)`` to train on and to test on: a tenth of the files of the library is held
    out. What is not ASCII is "?"."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(seed).shuffle(files)
    texts = [f.read_text("utf-8", "replace").encode("ascii", "replace") for f in files]
    few = len(files) // 10
    test, train = (bytearray(b"".join(t)) for t in (texts[:few], texts[few:]))
    return tuple(torch.frombuffer(t, dtype=torch.uint8).long() for t in (train, test))  # type: ignore[return-value]


def check_windows(context: int, windows: int, test_windows: int = 1) -> None:
    """Raises ValueError for sizes below 1."""
    if min(context, windows, test_windows) < 1:
        raise ValueError(
            f"context, windows and test_windows must be >= 1, got {context}, {windows} and "
            f"{test_windows}."
        )


def characters(
    seed: int = 0, *, context: int = 32, windows: int = 4096, test_windows: int = 512
) -> Dataset:
    """Random stretches of the library's text, and the characters that follow each place.

    Args:
        seed: of the files that are held out, and of the stretches.
        context: T, characters of a stretch.
        windows: stretches to train on.
        test_windows: stretches to test on, from files that were held out.

    Returns:
        A :class:`Dataset` of codes below 128: x and y ``(N, T)`` int64.

    Raises:
        ValueError: sizes below 1.
    """
    check_windows(context, windows, test_windows)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for text, count in zip(library(seed), (windows, test_windows), strict=True):
        starts = torch.randint(len(text) - context, (count, 1), generator=generator)
        codes = text[starts + torch.arange(context + 1)]
        parts += [codes[:, :-1].contiguous(), codes[:, 1:].contiguous()]
    return Dataset(*parts, classes=ASCII)
