"""A cell with its arguments as a map of states, for all samples or for some of them.

Which tensors among the arguments belong to samples? Either the caller says so, with a dimension for
each argument, or those are taken that have as many entries as the state along its batch dimension.
Sizes may coincide, so ``solve.unfinished`` compares a part of the batch with the whole before it
relies on either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..options import Options
from ..samples import Compact, take
from .arguments import in_order
from .eager import Eagerly
from .pinned import pinned
from .randomness import Replay
from .state_tree import described

#: Places of tensors among the leaves of all arguments, and the dimension of each to take from.
Taken = dict[int, int]


@dataclass(eq=False)
class CellMap:
    """``state -> cell(state, *arguments, **keywords)``."""

    cell: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)

    #: Whether the cell returns ``(state, aux)``.
    has_aux: bool = False
    #: What calls the cell, where its evaluations are to draw the same random numbers.
    replay: Replay | None = None

    @classmethod
    def of_call(
        cls,
        cell: Any,
        start: Any,
        options: Options,
        arguments: tuple[Any, ...] = (),
        keywords: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> CellMap:
        """That of a layer's call; the cell takes the first argument by ``name`` where there is
        one."""
        keywords = keywords or {}
        if name is not None:
            arguments, keywords = arguments[1:], {name: arguments[0], **keywords}
        same = options.randomness == "same"
        replay = Replay((start, arguments, keywords)) if same else None
        return cls(cell, arguments, keywords, options.has_aux, replay)

    def __call__(self, state: Any) -> Any:
        if self.replay is None and not self.has_aux:
            return self.cell(state, *self.arguments, **self.keywords)
        value = self._evaluated(state)
        return _pair(value)[0] if self.has_aux else value

    def pinned(self) -> CellMap:
        """The same with the tensors that the cell has now, whatever is in their places later."""
        return replace(self, cell=pinned(self.cell))

    def auxiliary(self, state: Any) -> Any:
        """What the cell returns beside the state, evaluated at one that its caller may write to;
        with its gradient in grad mode."""
        own = tree_map(lambda t: t.clone(), state)
        with Eagerly() if torch.is_grad_enabled() else contextlib.nullcontext():
            return _pair(self._evaluated(own))[1]

    def _evaluated(self, state: Any) -> Any:
        if self.replay is None:
            return self.cell(state, *self.arguments, **self.keywords)
        return self.replay(self.cell, state, *self.arguments, **self.keywords)

    def ways(self, batch: int, batch_dim: int, ndim: int, compact: Compact) -> Iterator[Taken]:
        """Ways to tell what belongs to samples, the likeliest first, for a state whose ``ndim``
        dimensions have ``batch`` samples in ``batch_dim``.

        Raises:
            ValueError: ``compact`` names dimensions that the arguments do not have.
        """
        if not isinstance(compact, bool):
            yield self._named(batch, compact)
            return
        leaves = tree_flatten((self.arguments, self.keywords))[0]
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
        leaves, spec = tree_flatten((self.arguments, self.keywords))
        for i, dim in taken.items():
            leaves[i] = take(leaves[i], samples, dim)
        arguments, keywords = tree_unflatten(leaves, spec)
        return replace(self, arguments=arguments, keywords=keywords)

    def _named(self, batch: int, dims: tuple[int | None, ...]) -> Taken:
        names = in_order(self.cell, self.keywords) if self.keywords else []
        count = len(self.arguments) + len(names)
        if len(dims) != count:
            raise ValueError(
                f"compact={dims!r} has {len(dims)} entries for {count} arguments of the cell after "
                "the state; give one for each, in the order of the cell's parameters: the "
                "dimension that counts samples, or None for what all samples share."
            )
        by_name = dict(zip(names, dims[len(self.arguments) :], strict=True))
        arguments = [
            *((f"argument {i}", dims[i], a) for i, a in enumerate(self.arguments)),
            *((f"argument {name!r}", by_name[name], a) for name, a in self.keywords.items()),
        ]
        taken: Taken = {}
        place = 0
        for which, dim, argument in arguments:
            for leaf in tree_flatten(argument)[0]:
                if dim is not None and isinstance(leaf, Tensor):
                    known = _may_be_taken(leaf) and -leaf.dim() <= dim < leaf.dim()
                    if not known or leaf.shape[dim] != batch:
                        raise ValueError(
                            f"compact={dims!r}: {which} of the cell after the state has a tensor "
                            f"of shape {tuple(leaf.shape)}, without {batch} samples in dimension "
                            f"{dim}."
                        )
                    taken[place] = dim % leaf.dim()
                place += 1
        return taken


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(
            f"the cell returned {described(value)}; with has_aux=True it returns (state, aux)."
        )
    return value


def _may_be_taken(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout is torch.strided and not t.is_nested
