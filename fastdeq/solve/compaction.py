"""How the samples of one call of a cell are told apart, so that some of them can go on alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import warn_caller
from ..samples import Compact
from .cell_map import CellMap, Taken
from .packing import ArgumentWrittenError, Packing
from .unfinished import Map, Narrow, agree

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
    """

    def __init__(
        self, f: CellMap, packing: Packing, compact: Compact, tol: float, refusals: set[Any]
    ):
        self._f, self._packing, self._compact, self._tol = f, packing, compact, tol
        self._refusals = refusals
        self._call = (getattr(f.cell, "training", None), packing.batch, len(f.arguments))
        self._taken: Taken | None = None
        self._epsilon = _epsilon(packing)

    @property
    def refused(self) -> bool:
        """Whether no way agreed."""
        return self._call in self._refusals

    def agreeing(
        self,
        samples: Tensor,
        expected: Tensor,
        evaluate: Callable[[Map], tuple[Tensor, Evaluated]],
        epsilon: float = 0.0,
    ) -> Evaluated | None:
        """What ``evaluate`` makes, beside its value ``(b, n)``, of the first map of ``samples``
        ``(b,)`` whose value is that ``expected`` ``(b, n)`` up to rounding, with the machine
        epsilon ``epsilon`` if that is the larger one; None where no map has it."""
        if self.refused:
            return None
        for taken in self._ways():
            try:
                value, found = evaluate(self._map_of(samples, taken))
            except ArgumentWrittenError:
                raise
            except Exception:  # the cell cannot take such arguments: one way not to agree
                continue
            if agree(value, expected, self._tol, max(epsilon, self._epsilon)):
                self._taken = taken
                return found
        if not self._refusals:
            warn_caller(_REFUSED.format(self._compact), UserWarning)
        self._refusals.add(self._call)
        return None

    def parts(self, around: Callable[[Map], Map]) -> Callable[..., Any]:
        """:meth:`agreeing`, with ``around`` each map."""

        def agreeing(samples: Tensor, expected: Tensor, evaluate: Callable[..., Any]) -> Any:
            return self.agreeing(samples, expected, lambda part: evaluate(around(part)))

        return agreeing

    def narrowing(self, around: Callable[[Map], Map], epsilon: float = 0.0) -> Narrow:
        """What makes the maps of some samples: ``around`` each, as the map of all is evaluated."""

        def narrow(samples: Tensor, point: Tensor | None, value: Tensor | None) -> Map | None:
            if point is None or value is None:  # only after one was found
                return None if self._taken is None else around(self._map_of(samples, self._taken))
            rows = point.index_select(0, samples)

            def evaluate(part: Map) -> tuple[Tensor, Map]:
                part = around(part)
                return part(rows), part

            return self.agreeing(samples, value.index_select(0, samples), evaluate, epsilon)

        return narrow

    def _map_of(self, samples: Tensor, taken: Taken) -> Map:
        part = self._packing.for_samples(len(samples))
        return part.rowwise(self._f.of(samples, taken))

    def _ways(self) -> Iterator[Taken]:
        if self._taken is not None:
            return iter((self._taken,))
        (dim,) = self._packing.dims
        return self._f.ways(self._packing.batch, dim, self._packing.ndims[0], self._compact)


def _epsilon(packing: Packing) -> float:
    """Of the lowest precision in which a map of such states is evaluated now."""
    dtypes = list(packing.dtypes)
    kind = packing.device.type
    if torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    return max(torch.finfo(dtype).eps for dtype in dtypes)
