"""What a weight states of its W, and when that is believed.

A statement (tags, a norm bound) is about the W that the weight's own class computes. Whatever was
attached to the object (a hook, a patched method) may change W, so nothing is believed of it then,
and W is any dense matrix. The same goes for what a subclass of a family inherits, where it computes
W in a way of its own: it has to state anew what still holds. A parametrisation or a mask of the
unconstrained matrix changes nothing: W is made from whatever that is.
"""

from __future__ import annotations

import numbers
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from ..errors import check_choice
from .attached import is_modified
from .dense import Dense, Structured
from .maps import OrthogonalMap, SymmetricMap
from .orthogonal import Orthogonal
from .symmetric import Symmetric

Tag = Literal["orthogonal", "symmetric"]
TAGS: tuple[Tag, ...] = get_args(Tag)


class Statement(NamedTuple):
    """What is certain of W: tags, a bound on its 2-norm, whether it is symmetric to the last bit at
    all times."""

    tags: frozenset[str] = frozenset()
    norm_bound: float | None = None
    bitwise_symmetric: bool = False


class _Family(NamedTuple):
    """The methods of which W is made, as they were written, and the class of the map in them."""

    methods: tuple[tuple[str, Any], ...]
    map: type[nn.Module]


def _family(kind: type[Structured], map_kind: type[nn.Module], *names: str) -> _Family:
    return _Family(tuple((n, getattr(kind, n)) for n in ("forward", *names)), map_kind)


_FAMILIES: dict[type[Structured], _Family] = {
    Orthogonal: _family(Orthogonal, OrthogonalMap, "compose", "current_scale"),
    Symmetric: _family(Symmetric, SymmetricMap, "compose"),
}
_NOTHING = Statement()


def stated(weight: nn.Module) -> Statement:
    """What ``weight`` states of the W that it returns now, as far as that is believed.

    Raises:
        TypeError, ValueError: tags or a bound that no weight can have, with what it may state.
    """
    if is_modified(weight):
        return _NOTHING
    kind, own = type(weight), weight.__dict__
    if kind is Dense and "tags" not in own and "norm_bound" not in own:
        return _NOTHING
    for structured in _FAMILIES:
        if issubclass(kind, structured):
            return _of_family(weight, structured)
    return Statement(_checked_tags(weight), _checked_bound(weight))


def _of_family(weight: Any, family: type[Structured]) -> Statement:
    kind = type(weight)
    if _computes_like(weight, _FAMILIES[family]):
        if kind is family:
            bound = _checked_bound(weight) if "norm_bound" in vars(weight) else weight.norm_bound()
            return Statement(weight.tags, bound, family is Symmetric and weight.parametrized)
        tags = _checked_tags(weight)
        symmetric = family is Symmetric and weight.parametrized and "symmetric" in tags
        return Statement(tags, _checked_bound(weight), symmetric)
    inherits_tags = kind.tags is family.tags
    inherits_bound = kind.norm_bound is family.norm_bound and "norm_bound" not in vars(weight)
    return Statement(
        frozenset() if inherits_tags else _checked_tags(weight),
        None if inherits_bound else _checked_bound(weight),
    )


def _computes_like(weight: nn.Module, family: _Family) -> bool:
    kind = type(weight)
    if kind.__call__ is not nn.Module.__call__:  # compared now: torch.export replaces that one
        return False
    for name, method in family.methods:
        if getattr(kind, name) is not method:
            return False
    return type(weight._modules.get("map")) is family.map


def _checked_tags(weight: nn.Module) -> frozenset[str]:
    tags: Any = getattr(weight, "tags", frozenset())
    name = type(weight).__name__
    if isinstance(tags, str) or not all(isinstance(tag, str) for tag in tags):
        raise TypeError(
            f'{name}.tags must be a set of names such as {{"symmetric"}}, not {tags!r}.'
        )
    for tag in tags:
        check_choice(tag, TAGS, f"tag of {name}")
    return frozenset(tags)


def _checked_bound(weight: nn.Module) -> float | None:
    method = getattr(weight, "norm_bound", None)
    name = type(weight).__name__
    if method is None:
        return None
    if not callable(method):
        raise TypeError(f"{name}.norm_bound must be a method that returns a number or None.")
    bound: Any = method()
    if bound is not None and not (isinstance(bound, numbers.Real) and float(bound) >= 0):
        raise ValueError(f"{name}.norm_bound() is {bound!r}; it must be a number >= 0, or None.")
    return None if bound is None else float(bound)
