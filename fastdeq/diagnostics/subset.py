"""Some samples of a batch, with what belongs to them among the arguments of a cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..options import Options
from ..samples import take
from ..solve.cell_map import CellMap
from ..solve.packing import Packing


class Subset(NamedTuple):
    """Samples ``(S,)`` int64 of the batch, a map of theirs alone, and their state."""

    samples: Tensor
    f: CellMap
    z: Any


def spread_over(rank: Tensor, count: int) -> Tensor:
    """At most ``count`` samples, evenly over the order of ``rank`` ``(B,)``, both ends among them;
    the highest first ``(S,)``."""
    order = torch.argsort(rank, descending=True, stable=True)
    if len(order) <= count:
        return order
    places = torch.linspace(0, len(order) - 1, count, device=rank.device)
    return order[places.round().long()]


@torch.no_grad()
def subset(f: CellMap, z: Any, samples: Tensor, options: Options) -> Subset:
    """That of ``samples``, where the map of these alone gives what that of all does; else all."""
    packing = Packing(z, options.batch_dim)
    everyone = torch.arange(packing.batch, device=samples.device)
    dim = options.batch_dim
    if len(samples) == packing.batch or not isinstance(dim, int) or not packing.dims:
        return Subset(everyone, f, z)
    packing.copies = True
    part = tree_map(lambda t: take(t, samples, dim % t.dim()), z)
    whole = packing.pack(f(tree_map(torch.clone, z)))[samples]
    small = Packing(part, dim)
    small.copies = True
    for way in _ways(f, packing, options):
        try:
            chosen = f.of(samples, way)
            value = small.pack(chosen(tree_map(torch.clone, part)))
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        # Rounding of sums in another order; a map that takes others' arguments is far off.
        if torch.allclose(value, whole, rtol=1e-2, atol=1e-3, equal_nan=True):
            return Subset(samples, chosen, part)
    return Subset(everyone, f, z)


def _ways(f: CellMap, packing: Packing, options: Options) -> Iterator[dict[int, int]]:
    dim = options.batch_dim
    assert isinstance(dim, int)
    yield from f.ways(packing.batch, dim, packing.ndims[0], options.compact or True)
