"""A loss at several states along a solve, those nearer to the equilibrium weighing more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ....errors import check_choice, check_options


def _exponential(n: int, k: int, gamma: float = 0.8, **_: Any) -> float:
    return float(gamma ** (n - 1 - k))


def _linear(n: int, k: int, gamma: float = 0.9, bias: float = 0.0, **_: Any) -> float:
    return 1 - gamma * (n - 1 - k) / n + bias


def _constant(n: int, k: int, c: float = 1.0, **_: Any) -> float:
    return c


_BUILT_IN: dict[str, Callable[..., Any]] = {
    "exp": _exponential,
    "linear": _linear,
    "const": _constant,
}
_OPTIONS = ("gamma", "bias", "c")  # of any of these, so that one can be exchanged for another
_weights = dict(_BUILT_IN)


def register_weight_func(name: str, func: Callable[..., Any]) -> None:
    """Makes ``func(n, k, **options)``, the weight of state k of n, known as ``name``."""
    if not callable(func):
        raise TypeError(f"a weight function must be callable, not {func!r}.")
    _weights[name] = func


def fp_correction(
    crit: Callable[..., Any],
    args: Sequence[Any],
    weight_func: str = "exp",
    return_loss_values: bool = False,
    **kwargs: Any,
) -> Any:
    """The weighted sum of ``crit`` over states: fixed-point correction.

    Args:
        crit: a loss of as many arguments as ``args`` has.
        args: lists of states, of targets and so on; what is no list, or a shorter one, is repeated.
        weight_func: "exp", ``gamma ** (n - 1 - k)``; "linear", ``1 - gamma (n - 1 - k) / n +
            bias``; "const", ``c``; or one that was registered.
        return_loss_values: return the losses as numbers too.
        kwargs: gamma, bias and c, or what a registered function takes.

    Returns:
        The loss, or that and a list of floats.

    Raises:
        ValueError, TypeError: an unknown weight function or option.
    """
    check_choice(weight_func, _weights, "weight_func")
    weight = _weights[weight_func]
    if weight in _BUILT_IN.values():
        unknown = {name: value for name, value in kwargs.items() if name not in _OPTIONS}
        check_options(unknown, _OPTIONS, f"fp_correction(weight_func={weight_func!r})")
    lists = [list(each) if isinstance(each, (list, tuple)) else [each] for each in args]
    n = max(map(len, lists), default=0)
    total: Any = 0.0
    values = []
    for k in range(n):
        loss = crit(*(each[k % len(each)] for each in lists))
        total = total + weight(n, k, **kwargs) * loss
        if return_loss_values:
            values.append(float(loss))
    return (total, values) if return_loss_values else total
