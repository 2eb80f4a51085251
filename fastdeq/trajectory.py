"""``trajectory``: states along the way to an equilibrium, for losses on them."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from .layer import DEQLayer
from .solve.along import Along
from .solve.arguments import refuse_keywords
from .solve.start import check_start


def trajectory(
    layer: DEQLayer,
    x: Any,
    *context: Any,
    states: int | Sequence[int],
    z0: Any = None,
    **keywords: Any,
) -> list[Any]:
    """States along one solve of ``layer``, the equilibrium last, each with its gradient.

    ``layer(x)`` is the last of them. The others are where the solver was after so many updates; a
    sample that stopped before is at its end. Each is differentiated by the layer's ``gradient``: an
    implicit one is that of an equilibrium at that state, "one_step" and phantom steps start there,
    and truncated or unrolled gradients are those of the steps so far. Any cell is called as a
    general one, an :class:`AffineCell` too.

    Args:
        layer: a layer without ``compact``, ``has_aux``, ``precision="mixed"`` or a reversible
            gradient.
        x, context, z0, keywords: what the layer takes.
        states: numbers of updates, >= 1, ascending (torchdeq's ``indexing``); or how many states in
            all, spaced evenly over the most updates that the solver makes (``n_states``).

    Returns:
        A list of states, one more than there are numbers of updates, or ``states`` of them.

    Raises:
        TypeError, ValueError: arguments or a layer that do not fit.
    """
    if not isinstance(layer, DEQLayer):
        raise TypeError(f"layer must be a DEQLayer, not {type(layer).__name__}.")
    options = layer.options
    wrong = [
        f"{name}={value!r}"
        for name, value, allowed in (
            ("compact", options.compact, options.compact is False),
            ("has_aux", options.has_aux, not options.has_aux),
            ("precision", options.precision, options.precision != "mixed"),
            ("gradient", options.gradient, getattr(options.gradient, "name", "") != "reversible"),
        )
        if not allowed
    ]
    if wrong:
        way = " Pass a layer without it."
        if options.has_aux:
            way = (
                " Pass a layer around the state alone, DEQLayer(lambda z, x: cell(z, x)[0], ...), "
                "and call the cell at the states for the rest."
            )
        raise ValueError(f"there are no states along a solve with {', '.join(wrong)}.{way}")
    if z0 is not None:
        check_start(options.solver)
    updates = getattr(options.solver, "fixed_iterations", 0) or options.max_iter
    refuse_keywords(layer.cell, keywords)
    along = Along(_counts(states, updates))
    z = layer._solve_general(x, context, keywords, z0, None, along)
    return [*along.states, z]


def _counts(states: Any, updates: Any) -> tuple[int, ...]:
    """Numbers of updates; raises ValueError for others than ascending integers from 1."""
    if isinstance(states, numbers.Integral) and not isinstance(states, bool) and int(states) >= 1:
        if isinstance(updates, str):
            raise ValueError("a certified count of updates is not known here: list the numbers.")
        spaced = {updates * i // int(states) for i in range(1, int(states))}
        if int(states) > updates:
            raise ValueError(
                f"states={states!r}, but the solver makes at most {updates} updates, so that there "
                f"are no more than {updates} states: ask for fewer, or raise max_iter."
            )
        return tuple(sorted(spaced))
    given = tuple(states) if isinstance(states, (tuple, list, range)) else ()
    integers = all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in given)
    if not given or not integers or list(given) != sorted(set(given)) or given[0] < 1:
        raise ValueError(
            "states must be ascending numbers of updates from 1 on, such as (2, 5, 10), or how "
            f"many states in all, such as 3, got {states!r}."
        )
    return tuple(int(n) for n in given)
