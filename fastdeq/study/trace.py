"""What happened at each step of a run, and the same in a few numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..solution import Solution

BINS = 48  # points of a trace: what a plot can show

#: Of each step: loss, mean updates of a sample, median residual and share converged of the forward
#: solve, mean updates of the adjoint solve, length of the gradient.
COLUMNS = (
    "loss",
    "forward_iterations",
    "forward_residual",
    "forward_converged",
    "backward_iterations",
    "gradient_norm",
)


class Tally:
    """Sums over solves, kept on the device: reading them every step would synchronise it."""

    def __init__(self) -> None:
        self.samples = 0
        self.sums: Tensor | float = 0.0

    def add(self, solution: Solution | None) -> None:
        if solution is None:  # a gradient without a solve
            return
        self.samples += len(solution.status)
        parts = (solution.iterations, solution.converged, solution.nonfinite)
        self.sums = self.sums + torch.stack([p.sum(dtype=torch.float64) for p in parts])

    def read(self) -> tuple[float, float, int]:
        """Mean iterations, share converged, number of non-finite solves."""
        if not self.samples:
            return math.nan, math.nan, 0
        assert isinstance(self.sums, Tensor)
        iterations, converged, nonfinite = self.sums.tolist()
        return iterations / self.samples, converged / self.samples, int(nonfinite)


class Trace:
    """Rows of ``COLUMNS``, one for each step; they stay on the device until the end."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def add(
        self, loss: Tensor, forward: Solution, adjoint: Solution | None, gradient: Tensor
    ) -> None:
        missing = loss.new_full((), math.nan)
        row = (
            loss.detach(),
            forward.iterations.float().mean(),
            forward.residual.float().median(),
            forward.converged.float().mean(),
            missing if adjoint is None else adjoint.iterations.float().mean(),
            gradient.detach(),
        )
        self.rows.append(torch.stack([value.float() for value in row]))

    def binned(self) -> dict[str, list[Any]]:
        """Means over at most ``BINS`` stretches of steps; ``step`` is the last of each."""
        table = torch.stack(self.rows).double().cpu().numpy()
        parts = np.array_split(np.arange(len(table)), min(BINS, len(table)))
        means = np.stack([table[part].mean(0) for part in parts])
        columns = {name: means[:, i].tolist() for i, name in enumerate(COLUMNS)}
        return {"step": [int(part[-1]) + 1 for part in parts], **columns}
