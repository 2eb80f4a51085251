"""Tensors that a function holds: in its closure, its defaults, its modules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

_FEW, _MANY = 1000, 50_000  # objects to look at
_CODE = (FunctionType, MethodType, functools.partial)


def held_tensors(f: Any, *, everywhere: bool = False) -> Iterator[Tensor]:
    """Tensors with a ``grad_fn`` that are reached from the function ``f``: arguments in its closure
    and its defaults, in containers of these and in functions that it holds.

    With ``everywhere`` also what modules and other objects have as attributes, global variables
    that are more than a tensor, and weights cached by ``torch.nn.utils.parametrize.cached``. A
    function that holds very much is not searched to the end.
    """
    stack: list[Any] = [f]
    if everywhere:
        stack.append(getattr(parametrize, "_cache", None))
    seen: set[int] = set()
    for _ in range(_MANY if everywhere else _FEW):
        if not stack:
            return
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if item.grad_fn is not None:
                yield item
        elif isinstance(item, (list, tuple, set)):
            stack += item
        elif isinstance(item, Mapping):
            stack += item.values()
        elif isinstance(item, FunctionType):
            stack += _of_function(item, everywhere)
        elif isinstance(item, MethodType):
            stack += (item.__func__, item.__self__)
        elif isinstance(item, functools.partial):
            stack += (item.func, item.args, item.keywords)
        elif isinstance(item, (type, ModuleType)):
            pass
        elif everywhere or dataclasses.is_dataclass(item):
            stack += getattr(item, "__dict__", {}).values()
        elif isinstance(item, nn.Module):  # a layer around a function
            stack += [part for part in vars(item).values() if isinstance(part, _CODE)]


def _of_function(f: FunctionType, everywhere: bool) -> Iterator[Any]:
    for cell in f.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield f.__defaults__
    yield f.__kwdefaults__
    for name in f.__code__.co_names:
        value = f.__globals__.get(name)
        if isinstance(value, Tensor) or everywhere:
            yield value
