"""Two small models around general cells, and what they are trained on.

    characters   a causal transformer block as the cell, on the source text of the Python standard
                 library, next character; what the text is depends on the version of Python
    digits       a multiscale cell of two resolutions, on scikit-learn's 8x8 digits

A model is ``loss(solve, *batch)``, where ``solve(x, z0)`` gives the equilibrium of ``model.cell``.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from general_cells import Multiscale, State, Transformer
from general_problem import rows
from torch import Tensor, nn

Solve = Callable[[State, State], State]  # x, z0 -> z
Batch = tuple[Tensor, Tensor]
ASCII = 128


class Characters(nn.Module):
    """Next character; tokens (B, T) of codes below 128."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(ASCII, width)
        self.positions = nn.Parameter(0.1 * torch.randn(tokens, width))
        self.cell = Transformer(width, causal=True)
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, ASCII)

    def injection(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) + self.positions

    def constrain(self) -> None:
        """Nothing: it stays a contraction by itself."""

    def loss(self, solve: Solve, tokens: Tensor, following: Tensor) -> Tensor:
        x = self.injection(tokens)
        z = solve(x, torch.zeros_like(x))
        return F.cross_entropy(self.readout(self.norm(z)).flatten(0, 1), following.flatten())


class Digits(nn.Module):
    """Ten classes; images (B, 1, 8, 8)."""

    def __init__(self, channels: int):
        super().__init__()
        widths = (channels, 2 * channels)
        # Injections of norm 1 keep the cell a contraction: its own norms divide by their size.
        self.inject = nn.ModuleList(
            nn.Sequential(nn.Conv2d(1, width, 3, stride=i + 1, padding=1), nn.GroupNorm(4, width))
            for i, width in enumerate(widths)
        )
        self.cell = Multiscale(widths, gain=0.5)
        self.readout = nn.Linear(sum(width * (8 >> i) ** 2 for i, width in enumerate(widths)), 10)
        self.limits = [float(layer.weight.detach().norm()) for layer in self._convolutions()]

    def injection(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(images) for layer in self.inject)

    @torch.no_grad()
    def constrain(self) -> None:
        """After a step: no recurrent weight grows beyond its norm at the start."""
        for layer, limit in zip(self._convolutions(), self.limits, strict=True):
            layer.weight *= (limit / layer.weight.norm()).clamp(max=1)
        for norm in self.cell.norms:
            norm.weight.clamp_(-1, 1)

    def _convolutions(self) -> list[nn.Conv2d]:
        return [m for m in self.cell.modules() if isinstance(m, nn.Conv2d)]

    def loss(self, solve: Solve, images: Tensor, classes: Tensor) -> Tensor:
        x = self.injection(images)
        z = solve(x, tuple(map(torch.zeros_like, x)))
        return F.cross_entropy(self.readout(rows(z)), classes)


@dataclass(frozen=True)
class Task:
    """A model with its data. ``target``: the held-out loss to which the time is taken."""

    model: Callable[[], Any]
    batch: Callable[[torch.Generator], Batch]
    held_out: Batch
    learning_rate: float
    target: float


def characters(small: bool = False) -> Task:
    tokens, width, size = (8, 16, 4) if small else (64, 64, 16)
    text = library_text(20_000 if small else 400_000)
    split = len(text) * 9 // 10

    def windows(part: Tensor, count: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(part) - tokens - 1, (count, 1), generator=generator)
        chosen = part[starts + torch.arange(tokens + 1)]
        return chosen[:, :-1], chosen[:, 1:]

    return Task(
        model=lambda: Characters(tokens, width),
        batch=lambda generator: windows(text[:split], size, generator),
        held_out=windows(text[split:], 8 if small else 64, torch.Generator().manual_seed(1)),
        learning_rate=3e-3,
        target=2.5,
    )


def library_text(length: int) -> Tensor:
    """Codes (length,) of the standard library's modules in order; what is not ASCII is "?"."""
    codes: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        codes += path.read_bytes().decode("utf-8", "replace").encode("ascii", "replace")
        if len(codes) >= length:
            break
    return torch.tensor(codes[:length])


def digits(small: bool = False) -> Task:
    """
    Raises:
        ImportError: scikit-learn is missing.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    classes = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    held, rest = order[:300], order[300:]
    size, channels = (4, 4) if small else (64, 16)

    def batch(generator: torch.Generator) -> Batch:
        chosen = rest[torch.randint(len(rest), (size,), generator=generator)]
        return images[chosen], classes[chosen]

    return Task(
        model=lambda: Digits(channels),
        batch=batch,
        held_out=(images[held[:8] if small else held], classes[held[:8] if small else held]),
        learning_rate=1e-3,
        target=0.15,
    )


TASKS = {"characters": characters, "digits": digits}
