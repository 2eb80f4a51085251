"""A cell with its arguments as a map of states, for all samples or for some of them.

Which tensors among the arguments belong to samples? Either the caller says so, with a dimension for
each argument, or those are taken that have as many entries as the state along its batch dimension.
Sizes may coincide, so ``solve.unfinished`` compares a part of the batch with the whole before it
relies on either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..samples import Compact, take

#: Places of tensors among the leaves of all arguments, and the dimension of each to take from.
Taken = dict[int, int]


@dataclass(eq=False)
class CellMap:
    """``state -> cell(state, *arguments)``."""

    cell: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self, state: Any) -> Any:
        return self.cell(state, *self.arguments)

    def ways(self, batch: int, batch_dim: int, ndim: int, compact: Compact) -> Iterator[Taken]:
        """Ways to tell what belongs to samples, the likeliest first, for a state whose ``ndim``
        dimensions have ``batch`` samples in ``batch_dim``.

        Raises:
            ValueError: ``compact`` names dimensions that the arguments do not have.
        """
        if not isinstance(compact, bool):
            yield self._named(batch, compact)
            return
        leaves = tree_flatten(self.arguments)[0]
        dim = batch_dim % ndim
        every = {
            i: dim
            for i, t in enumerate(leaves)
            if _may_be_taken(t)
            and t.dim() > dim
            and t.shape[dim] == batch
            and (dim == 0 or t.dim() == ndim)
        }
        yield every
        if len(every) > 1:
            for left_whole in every:
                yield {i: d for i, d in every.items() if i != left_whole}

    def of(self, samples: Tensor, taken: Taken) -> CellMap:
        """The same for the samples ``(b,)`` int64 alone."""
        leaves, spec = tree_flatten(self.arguments)
        for i, dim in taken.items():
            leaves[i] = take(leaves[i], samples, dim)
        return replace(self, arguments=tree_unflatten(leaves, spec))

    def _named(self, batch: int, dims: tuple[int | None, ...]) -> Taken:
        if len(dims) != len(self.arguments):
            raise ValueError(
                f"compact={dims!r} has {len(dims)} entries for {len(self.arguments)} arguments of "
                "the cell after the state; give one for each: the dimension that counts samples, "
                "or None for what all samples share."
            )
        taken: Taken = {}
        place = 0
        for position, (dim, argument) in enumerate(zip(dims, self.arguments, strict=True)):
            for leaf in tree_flatten(argument)[0]:
                if dim is not None and isinstance(leaf, Tensor):
                    known = _may_be_taken(leaf) and -leaf.dim() <= dim < leaf.dim()
                    if not known or leaf.shape[dim] != batch:
                        raise ValueError(
                            f"compact={dims!r}: argument {position} of the cell after the state "
                            f"has a tensor of shape {tuple(leaf.shape)}, without {batch} samples "
                            f"in dimension {dim}."
                        )
                    taken[place] = dim % leaf.dim()
                place += 1
        return taken


def _may_be_taken(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout is torch.strided and not t.is_nested
