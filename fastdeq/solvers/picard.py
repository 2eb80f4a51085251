"""Plain and damped fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import CheckedOptions, Problem, Step, check_range


@dataclass(frozen=True)
class Picard(CheckedOptions):
    """``z <- z + damping * (f(z) - z)``, ``damping`` in (0, 1]; linear on contractions."""

    damping: float = 1.0

    name: ClassVar[str] = "picard"
    linear: ClassVar[bool] = False
    patience: ClassVar[int] = 50
    rejects: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_range("Picard", "damping", self.damping, 1e-12, 1.0, "in (0, 1]")

    def init(self, point: Tensor, problem: Problem) -> None:
        return None

    def step(
        self, state: None, point: Tensor, value: Tensor, norm: Tensor, running: Tensor
    ) -> Step:
        following = value if self.damping == 1.0 else point + self.damping * (value - point)
        return Step(following, None, ~norm.isfinite())

    def counters(self, state: None) -> tuple[Tensor, ...]:
        return ()
