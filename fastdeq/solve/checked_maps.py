"""Which maps were seen to treat their samples independently, so that each is checked once.

What is the same map? Its code, the modules in it and which of these are in training mode, the
number of dimensions of each part of the state, and ``batch_dim``. Not its tensors: a function that
is made anew at each call, as a lambda over x is, has the same code each time. All is referenced
weakly.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..samples import BatchDim
from .coupling import Map, check_of

#: Most maps remembered by a layer or for one code; more are forgotten and checked again.
_MOST = 64
#: Most functions and objects that are looked into for modules.
_DEPTH = 64


class _Same(weakref.ref):  # type: ignore[type-arg]
    """A weak reference, equal to others to the same object, whatever the object's ``==`` says."""

    __slots__ = ("address",)

    def __new__(cls, thing: Any, callback: Any = None) -> _Same:
        return super().__new__(cls, thing, callback)

    def __init__(self, thing: Any, callback: Any = None) -> None:
        super().__init__(thing, callback)  # type: ignore[call-arg]
        self.address = id(thing)

    def __hash__(self) -> int:
        return self.address

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, _Same) or self.address != other.address:
            return False
        thing = self()
        return thing is not None and thing is other()

    def __ne__(self, other: object) -> bool:
        return not self == other


class CheckedMaps:
    """The maps of one layer, or those with one code, that were seen to be independent.

    Threads may share it: the worst that can happen is a second check. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._keys: set[Any] = set()

    def check_of(
        self, f: Any, batch_dim: BatchDim, dims: tuple[int, ...], rows: Tensor
    ) -> Callable[[Map], None] | None:
        """What is to look at f as a map of rows, see ``coupling.check_of``; None where f was seen
        before. ``dims`` are the numbers of dimensions of the state's parts, ``rows`` ``(B, n)`` is
        the state."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or len(rows) < 2:
            return None
        key = _key(f)
        if key is not None and (key := (batch_dim, dims, *key)) in self._keys:
            return None

        def passed() -> None:
            if key is not None:
                if len(self._keys) >= _MOST:
                    self._keys.clear()
                self._keys.add(key)

        return check_of(rows, batch_dim, passed)

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckedMaps:
        return CheckedMaps()

    def __reduce__(self) -> tuple[type[CheckedMaps], tuple[()]]:
        return CheckedMaps, ()


_by_code: dict[_Same, CheckedMaps] = {}


def with_the_code_of(f: Any) -> CheckedMaps:
    """What is known of functions with the code of f, for as long as that code exists."""
    while isinstance(f, (functools.partial, types.MethodType)):
        f = f.func if isinstance(f, functools.partial) else f.__func__
    try:
        anchor = _Same(f.__code__ if isinstance(f, types.FunctionType) else f, _forget)
    except TypeError:  # no weak references to it
        return CheckedMaps()
    return _by_code.setdefault(anchor, CheckedMaps())


def _forget(anchor: _Same) -> None:
    _by_code.pop(anchor, None)


def modules_of(f: Any) -> list[nn.Module]:
    """The modules that f holds or names."""
    return _contents(f)[1]


def _key(f: Any) -> tuple[Any, ...] | None:
    """What makes f the map it is; None where f cannot be known again."""
    codes, modules = _contents(f)
    try:
        known = [*codes, *modules] or [f]
        return (*map(_Same, known), _state_of(modules))
    except TypeError:  # no weak references to it
        return None


def _contents(f: Any) -> tuple[list[types.CodeType], list[nn.Module]]:
    """Codes of the functions that f is made of, and the modules that it holds or names."""
    codes, modules = [], []
    todo: list[Any] = [f]
    seen: set[int] = set()
    while todo and len(seen) < _DEPTH:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            modules.append(thing)
        elif isinstance(thing, types.FunctionType):
            codes.append(thing.__code__)
            todo += filter(_may_hold, _named(thing))
        elif isinstance(thing, types.MethodType):
            todo += [thing.__self__, thing.__func__]
        elif isinstance(thing, functools.partial):
            todo += [thing.func, *filter(_may_hold, (*thing.args, *thing.keywords.values()))]
        else:
            call = getattr(type(thing), "__call__", None)  # noqa: B004
            held = getattr(thing, "__dict__", {}).values()
            todo += [v for v in held if issubclass(type(v), nn.Module)]
            todo += [call] if isinstance(call, types.FunctionType) else []
    return codes, modules


def _named(function: types.FunctionType) -> Iterator[Any]:
    """What a function closes over, and the globals that it names."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            continue
    there = function.__globals__
    yield from (there[name] for name in function.__code__.co_names if name in there)


def _may_hold(thing: Any) -> bool:
    kind = type(thing)  # isinstance would ask the object, which may stand for another
    if issubclass(kind, types.FunctionType):
        return not (thing.__module__ or "").startswith("torch.")
    if issubclass(kind, (Tensor, type, types.ModuleType)):
        return False
    try:
        return hasattr(thing, "__dict__")
    except Exception:  # of a proxy that stands for nothing now
        return False


def _state_of(modules: list[nn.Module]) -> tuple[int, ...]:
    """Which modules there are in these, and which of them are in training mode."""
    todo: list[Any] = list(modules)
    found: dict[int, bool] = {}
    while todo:
        module = todo.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module.training
            todo += module._modules.values()
    return tuple(2 * address + training for address, training in found.items())
