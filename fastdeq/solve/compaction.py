"""How the samples of one call of a cell are told apart, so that some of them can go on alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..constants import RESIDUAL_EPS
from ..errors import warn_caller
from ..samples import Compact
from ..solution import Solution
from .cell_map import CellMap, Taken
from .packing import ArgumentWrittenError, Packing
from .unfinished import Map, agree

Evaluated = TypeVar("Evaluated")

_REFUSED = (
    "compact={!r}: all samples are evaluated to the end, because the cell's value for a part of "
    "the batch was not that part of its value for the whole: its arguments are told apart wrongly, "
    "its samples depend on each other, it is random, or it holds something of the batch's size. "
    "Name the dimension that counts samples of each argument after the state, such as "
    "compact=(0, None), or pass compact=False."
)


class Compaction:
    """The map of some samples, made from that of all, and compared with it before it is used.

    ``refusals`` holds calls, of this layer, for which no way to tell samples apart agreed.

    Raises:
        ValueError: ``compact`` names dimensions that the arguments do not have.
    """

    def __init__(
        self, f: CellMap, packing: Packing, compact: Compact, tol: float, refusals: set[Any]
    ):
        self._f, self._packing, self._compact = f, packing, compact
        self._refusals = refusals
        training = getattr(f.cell, "training", None)
        self._call = (training, packing.batch, len(f.arguments), *f.keywords)
        self._taken: Taken | None = None
        # A residual that is judged with either value is then the same to a tenth of what decides,
        # or to the rounding of the map: some layers in the dtype of the rows, one rounding else.
        eps = torch.finfo(packing.dtype).eps
        self.limit = max(tol / 10, 16 * eps, 2 * _epsilon(packing))
        if not isinstance(compact, bool):
            next(self._ways())

    @property
    def refused(self) -> bool:
        """Whether no way agreed."""
        return self._call in self._refusals

    def refuse(self) -> None:
        """Leaves nothing out in this and later calls, and says so once."""
        if not self._refusals:
            warn_caller(_REFUSED.format(self._compact), UserWarning)
        self._refusals.add(self._call)

    def agreeing(
        self,
        samples: Tensor,
        expected: Tensor,
        evaluate: Callable[[Map], tuple[Tensor, Evaluated]],
    ) -> Evaluated | None:
        """What ``evaluate`` makes, beside its value ``(b, n)``, of the first map of ``samples``
        ``(b,)`` whose value is that ``expected`` ``(b, n)``; None where no map has it."""
        if self.refused:
            return None
        for taken in self._ways():
            try:
                part = self._packing.for_samples(len(samples))
                value, found = evaluate(part.rowwise(self._f.of(samples, taken)))
            except (ArgumentWrittenError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:  # the cell cannot take such arguments: one way not to agree
                continue
            if agree(value, expected, self.limit, self._packing.parts):
                self._taken = taken
                return found
        return None

    def narrow(self, samples: Tensor, rows: Tensor | None, value: Tensor | None) -> Map | None:
        """``unfinished.Narrow`` of the map itself."""
        if rows is None or value is None:
            return None
        at = rows
        found = self.agreeing(samples, value, lambda part: (part(at), part))
        if found is None and self._taken is None:
            self.refuse()
        return found

    def parts(self, around: Callable[[Map], Map]) -> Callable[..., Any]:
        """:meth:`agreeing`, with ``around`` each map."""

        def agreeing(samples: Tensor, expected: Tensor, evaluate: Callable[..., Any]) -> Any:
            return self.agreeing(samples, expected, lambda part: evaluate(around(part)))

        return agreeing

    def confirms(self, solution: Solution, value: Tensor) -> bool:
        """Whether the residuals of a solution are those with ``value`` ``(B, n)``, of the map of
        all samples at the solution's: up to a tenth, and what values may differ by."""
        z = solution.value
        sizes = self._packing.parts or [z.shape[1]]
        pairs = zip(value.split(sizes, 1), z.split(sizes, 1), strict=True)
        norms = torch.linalg.vector_norm
        found = torch.stack(
            [norms(v - p, dim=1) / (norms(v, dim=1) + RESIDUAL_EPS) for v, p in pairs]
        ).amax(0)
        known = solution.residual.isfinite() & value.isfinite().all(1)
        return bool((~known | (found <= 1.1 * solution.residual + self.limit)).all())

    def _ways(self) -> Iterator[Taken]:
        if self._taken is not None:
            return iter((self._taken,))
        (dim,) = self._packing.dims
        return self._f.ways(self._packing.batch, dim, self._packing.ndims[0], self._compact)


def _epsilon(packing: Packing) -> float:
    """Of the lowest precision in which a map of such states is evaluated now."""
    dtypes = list(packing.dtypes)
    kind = packing.device.type
    if autocasts(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def autocasts(device_type: str) -> bool:
    """Whether autocast is on there; not for devices that have none, as "meta"."""
    if not torch.amp.is_autocast_available(device_type):
        return False
    return torch.is_autocast_enabled(device_type)
