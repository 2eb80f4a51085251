"""``recommend``: what to change in a layer or a cell, and the changes that can be applied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..diagnosis import Diagnosis, Recommendation, listed
from ..layer import DEQLayer
from ..options import Options
from ..solve.arguments import check_cell
from ..weights.square import Names
from .measure import diagnose
from .recurrent import multiply, recurrent_squares

_OPTIONS = {f.name for f in dataclasses.fields(Options) if f.init}


@dataclass(frozen=True, eq=False, repr=False)
class Recommendations:
    """A sequence of :class:`Recommendation` with the :class:`Diagnosis` that they follow from.

    Attributes:
        diagnosis: what was measured.
    """

    diagnosis: Diagnosis
    _names: Names = None

    @property
    def changes(self) -> tuple[Recommendation, ...]:
        """The recommendations, the most urgent first."""
        return self.diagnosis.recommendations

    def __iter__(self) -> Iterator[Recommendation]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def __getitem__(self, index: int) -> Recommendation:
        return self.changes[index]

    def get(self, change: str, default: Any = None) -> Any:
        """The value recommended for ``change``, or ``default``."""
        return next((r.value for r in self.changes if r.change == change), default)

    def apply(self, layer: DEQLayer) -> tuple[Recommendation, ...]:
        """Makes those changes of ``layer`` that need no choice of yours: it multiplies the square
        weights by "scale", in place, and replaces options.

        Returns:
            What is left to you: "weight", "learning_rate" and "input", and a "scale" of weights
            that cannot be multiplied.

        Raises:
            TypeError: no :class:`fastdeq.DEQLayer`.
        """
        layer = _without_compiler(layer)
        if not isinstance(layer, DEQLayer):
            raise TypeError(f"the changes are made in a DEQLayer, not {type(layer).__name__}.")
        left = []
        for r in self.changes:
            if r.change in _OPTIONS:
                layer.options = dataclasses.replace(layer.options, **{r.change: r.value})
            elif r.change == "scale":
                squares = recurrent_squares(layer.cell, self._names)
                why = [w for s in squares if (w := multiply(s, r.value)) is not None]
                if why or not squares:
                    missing = "; ".join(why) or "no square weights are known"
                    left.append(dataclasses.replace(r, why=f"not applied ({missing}): {r.why}"))
            else:
                left.append(r)
        return tuple(left)

    def __str__(self) -> str:
        return listed(self.changes)

    def __repr__(self) -> str:
        return f"Recommendations({', '.join(r.change for r in self.changes) or 'nothing'})"


def recommend(
    target: Any,
    x: Any,
    *context: Any,
    tol: float | None = None,
    z0: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
    names: Names = None,
    samples: int = 8,
    max_products: int = 100,
    generator: torch.Generator | None = None,
    **keywords: Any,
) -> Recommendations:
    """What to change in a layer, or around a cell that has none yet, for a batch like x.

    It solves the batch, measures it as :meth:`fastdeq.DEQLayer.diagnose` does, and follows rules
    that are listed in docs/diagnostics.md. Where the spectral radius of the Jacobian is near 1 or
    beyond, factors of the square weights are tried on the probed samples, without a change to the
    cell, so that the radius they lead to is measured.

    Args:
        target: a :class:`fastdeq.DEQLayer`, or a cell, for which one with default options stands.
        x: what the layer takes.
        context: further arguments of the cell.
        tol: a tolerance that you want, in place of the layer's.
        z0: start of the solve.
        loss: a function of the state that returns one number; None: random directions.
        names: which square weights the state runs through, as in :mod:`fastdeq.init`; None: all.
        samples: most samples to probe for the spectrum of J.
        max_products: most products with J of a sample, >= 2.
        generator: of random directions; None: fixed ones.
        keywords: of the cell, by name.

    Returns:
        :class:`Recommendations`: to print, to look at one by one, or to ``apply(layer)``.

    Raises:
        TypeError, ValueError: what the layer raises for such arguments; options out of range.
    """
    target = _without_compiler(target)
    if isinstance(target, DEQLayer):
        layer = target
    else:
        check_cell(target, False)
        _refuse_models(target)
        layer = DEQLayer(target)
    if tol is not None:
        wanted = layer
        layer = DEQLayer(wanted.cell)
        layer.options = dataclasses.replace(wanted.options, tol=tol)
    found = diagnose(
        layer,
        x,
        context,
        keywords,
        z0=z0,
        loss=loss,
        names=names,
        samples=samples,
        max_products=max_products,
        generator=generator,
    )
    return Recommendations(found, names)


def _refuse_models(target: Any) -> None:
    """A model around a layer is neither a layer nor a cell."""
    modules = target.named_modules() if isinstance(target, nn.Module) else ()
    layers = [name for name, module in modules if isinstance(module, DEQLayer)]
    if layers:
        raise TypeError(
            f"{type(target).__name__} is a model with DEQ layers, {', '.join(layers)}: pass one of "
            "them, as model.get_submodule(name), with the input that it gets in the model."
        )


def _without_compiler(module: Any) -> Any:
    """The module that ``torch.compile`` has wrapped."""
    return getattr(module, "_orig_mod", module) if isinstance(module, nn.Module) else module
