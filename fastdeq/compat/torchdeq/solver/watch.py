"""What is watched at the evaluations of a solve: residuals, the best state, when it is finished.

torchdeq solves a batch until all of it has converged, and returns for each sample the value of its
best step. So does this: no sample is frozen while others go on, which a batch whose samples depend
on each other (the nodes of a graph) needs. An iteration of ``solve.iteration`` stops samples one by
one, so it is given no tolerance, and ended by an exception from within an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ....constants import RESIDUAL_EPS
from ....cuda_stream import DelayedCount
from .stat import SolverStat

#: Residual of a state that was not evaluated.
NOT_EVALUATED = 1e8


class FinishedError(Exception):
    """All samples have converged."""


class Watch:
    """A map of rows ``(B, n)`` whose evaluations are watched.

    Args:
        f: the map, or its damped steps.
        start: where nothing was evaluated, or nothing finite came of it, this is returned.
        samples: how many there are: B, or more where they are one row together.
        tol: converged is a residual below it, that of ``stop_mode``, "abs" or "rel".
        indexing: after which steps states are kept, None: none.
        before: evaluations that do not count as steps.
        traced_from: the first evaluation that the traces show, from 0.
        final: do not stop, and return the latest state rather than the best.
        damping: of f: residuals are those of the map that is damped.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        start: Tensor,
        samples: int,
        tol: float,
        stop_mode: str,
        indexing: Sequence[int] | None = None,
        *,
        before: int = 0,
        traced_from: int = 0,
        final: bool = False,
        damping: float = 1.0,
    ):
        self._f, self._tol, self._mode, self._damping = f, tol, stop_mode, damping
        self._before, self._traced_from, self._final = before, traced_from, final
        self._indexing = tuple(indexing or ())
        self._residuals: dict[str, list[Tensor]] = {"abs": [], "rel": []}
        self._samples = samples
        self._lowest = start.new_full((samples,), torch.inf)
        self._count = DelayedCount(start.device, samples)
        self._kept: dict[int, Tensor] = {}
        self.best = start

    def __call__(self, point: Tensor) -> Tensor:
        value = self._f(point)
        absolute = self._norm(value - point)
        if self._damping != 1.0:
            absolute = absolute / self._damping
        relative = absolute / (self._norm(value) + RESIDUAL_EPS)
        self._residuals["abs"].append(absolute)
        self._residuals["rel"].append(relative)
        residual = absolute if self._mode == "abs" else relative
        together = self._samples > len(value)  # samples of different steps would not fit each other
        judged = residual.amax().expand_as(residual) if together else residual
        better = judged < self._lowest  # never where it is NaN
        if self._final:
            better = torch.ones_like(better)
        rows = better[:1] if together else better
        self.best = torch.where(rows.unsqueeze(1), value, self.best)
        self._lowest = torch.where(better, judged, self._lowest)
        step = len(self._residuals["abs"]) - self._before
        if step in self._indexing:
            self._kept[step] = self.best
        # A sample with NaN keeps nobody waiting.
        if not self._final and not self._count.left(residual >= self._tol):
            raise FinishedError
        return value

    def _norm(self, rows: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(rows.reshape(self._samples, -1), dim=1)
        return norm

    def states(self) -> list[Tensor]:
        """The best states after the steps that were asked for, or at the end of a shorter solve."""
        return [self._kept.get(step, self.best) for step in self._indexing]

    def stat(self, columns: int) -> SolverStat:
        """The statistics, with so many columns of the traces: what was not evaluated is filled in
        with the least residuals."""
        lowest, traces, steps = {}, {}, {}
        for mode, seen in self._residuals.items():
            first = torch.full_like(self._lowest, NOT_EVALUATED)
            if not seen:
                lowest[mode], steps[mode] = first, torch.zeros_like(first, dtype=torch.float32)
                traces[mode] = [first] * columns
                continue
            of_steps = torch.stack(seen, 1).nan_to_num(nan=torch.inf).clamp(max=NOT_EVALUATED)
            lowest[mode], at = of_steps.min(1)
            if self._final:
                lowest[mode], at = of_steps[:, -1], torch.full_like(at, len(seen) - 1)
            steps[mode] = (at + 1 - self._before).clamp(min=0).to(torch.float32)
            shown = [first, *seen[self._traced_from :]][:columns]
            traces[mode] = shown + [lowest[mode]] * (columns - len(shown))
        return SolverStat.from_solver_info(self._mode, lowest, traces, steps)
