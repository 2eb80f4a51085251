"""Tensors that a function holds: in its closure, its defaults, its modules."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .pinned import Pinned

_FEW, _MANY = 1000, 50_000  # objects to look at
_CODE = (FunctionType, MethodType, functools.partial)
_PLAIN = frozenset((type(None), bool, int, float, str))


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
        if type(item) in _PLAIN or id(item) in seen:
            continue
        seen.add(id(item))
        kind = type(item)  # isinstance would ask the object, which may stand for another
        if issubclass(kind, Tensor):
            if item.grad_fn is not None:
                yield item
        elif issubclass(kind, FunctionType):
            _add_held(item, stack, everywhere)
        elif issubclass(kind, (list, tuple, set)):
            stack += item
        elif issubclass(kind, dict):
            stack += item.values()
        elif issubclass(kind, nn.Module) and not everywhere:  # a layer around a function
            stack += [part for part in vars(item).values() if type(part) in _CODE]
        elif issubclass(kind, Pinned):
            stack += (*item.made, item.cell)
        elif issubclass(kind, MethodType):
            stack += (item.__func__, item.__self__)
        elif issubclass(kind, functools.partial):
            stack += (item.func, item.args, item.keywords)
        elif issubclass(kind, (type, ModuleType)):
            continue
        elif everywhere or hasattr(kind, "__dataclass_fields__"):
            with contextlib.suppress(Exception):  # of a proxy that stands for nothing now
                stack += list(vars(item).values())


def _add_held(f: FunctionType, stack: list[Any], everywhere: bool) -> None:
    for cell in f.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            stack.append(cell.cell_contents)
    stack += (f.__defaults__, f.__kwdefaults__)
    for name in f.__code__.co_names:
        value = f.__globals__.get(name)
        if value is not None and (everywhere or isinstance(value, Tensor)):
            stack.append(value)
