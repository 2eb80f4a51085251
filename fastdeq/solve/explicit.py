"""A map with what it closes over as arguments, for transforms that replace these.

Under ``torch.func`` tensors are wrapped, and a closure over them cannot be differentiated or
batched from outside: the transform sees arguments alone. One evaluation is watched for the tensors
that reach it from outside; later ones run with others in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_get_level
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

Map = Callable[[Tensor], Tensor]


def is_transformed(t: Tensor) -> bool:
    """Whether a transform or a derivative follows t."""
    return (
        t.requires_grad
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
        or forward_ad.unpack_dual(t).tangent is not None
    )


class _Watch(TorchFunctionMode):
    """Collects tensors that a transform follows and that reach an operation from outside."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self._inside: dict[int, Tensor] = {id(z): z}  # kept: a number may be given again
        self.outside: dict[int, Tensor] = {}
        here = torch._C._functorch.peek_interpreter_stack()
        self._level = -1 if here is None else here.level()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs)):
            known = not isinstance(t, Tensor) or id(t) in self._inside or id(t) in self.outside
            if not known and is_transformed(t) and maybe_get_level(t) <= self._level:
                self.outside[id(t)] = t
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and id(t) not in self.outside:
                self._inside[id(t)] = t
        return out


class _Replace(TorchFunctionMode):
    """Operations on some tensors see others instead."""

    def __init__(self, instead: dict[int, Tensor]) -> None:
        super().__init__()
        self._instead = instead

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def replaced(t: Tensor) -> Tensor:
            return self._instead.get(id(t), t)

        args = tree_map_only(Tensor, replaced, args)
        if kwargs:
            kwargs = tree_map_only(Tensor, replaced, kwargs)
        return func(*args, **(kwargs or {}))


class ExplicitMap:
    """``f(z, *theta)`` of a map ``f(z)`` that closes over ``theta``, and returns none of them."""

    def __init__(self, f: Map, theta: Sequence[Tensor]):
        self.f, self.theta = f, list(theta)

    def __call__(self, z: Tensor, *theta: Tensor) -> Tensor:
        pairs = zip(self.theta, theta, strict=True)
        with _Replace({id(own): given for own, given in pairs}):
            return self.f(z)


def explicit(f: Map, z: Tensor) -> ExplicitMap:
    """``f``, rows ``(B, n)`` to rows, with the tensors that it closes over as arguments, as far as
    a transform or a derivative follows them; found in one evaluation at z, and checked in another.

    Raises:
        RuntimeError: f depends on a tensor in a way that cannot be seen.
    """
    with torch.no_grad(), _Watch(z) as watch:
        f(z)
    found = ExplicitMap(f, list(watch.outside.values()))
    with torch.enable_grad():
        value = found(z.detach(), *[t.detach() for t in found.theta])
    if _is_followed(value):
        raise RuntimeError(
            "the cell uses a tensor that is differentiated where torch.func cannot be told: in "
            "TorchScript, in a transform of its own, or with __torch_function__ off. Under "
            "torch.func and in forward mode a cell is made of PyTorch's operations, called from "
            "Python; write that part so, or differentiate with torch.autograd."
        )
    return found


def _is_followed(t: Tensor) -> bool:
    """Whether a derivative of any level follows t."""
    while True:
        if t.requires_grad or forward_ad.unpack_dual(t).tangent is not None:
            return True
        if not torch._C._functorch.is_functorch_wrapped_tensor(t):
            return False
        t = torch._C._functorch.get_unwrapped(t)
