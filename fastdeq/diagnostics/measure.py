"""``diagnose``: the measurements of a :class:`Diagnosis`, made on a layer that stays as it was."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..cells import AffineCell
from ..diagnosis import Diagnosis, largest
from ..estimate import Estimate, check_numbers
from ..layer import DEQLayer
from ..options import Options
from ..samples import as_rows
from ..solution import Solution
from ..solve.arguments import refuse_keywords
from ..solve.cell_map import CellMap
from ..solve.leading import leading_of
from ..solve.nonfinite import samples_of
from ..solve.packing import Packing
from ..weights.square import Names, Square
from .advice import Subject, Trial, advise
from .backward import backward
from .jacobian import jacobian_norm, spectral_radius
from .recurrent import Scaled, can_be_scaled, recurrent_squares
from .subset import Subset, spread_over, subset
from .untouched import untouched, usable

_PLAIN_STEPS = 100  # most that are made to see a contraction
_TRIAL_PRODUCTS = 50


def diagnose(
    layer: DEQLayer,
    x: Any,
    context: tuple[Any, ...],
    keywords: dict[str, Any],
    *,
    z0: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
    names: Names = None,
    samples: int = 8,
    max_products: int = 100,
    generator: torch.Generator | None = None,
) -> Diagnosis:
    """See :meth:`fastdeq.DEQLayer.diagnose`."""
    check_numbers(1e-2, max_products, 1e-3, generator)
    whole = isinstance(samples, numbers.Integral) and not isinstance(samples, bool)
    if not whole or samples < 1:
        raise ValueError(f"samples must be how many to probe, an integer >= 1, got {samples!r}.")
    if max_products < 2:
        raise ValueError(f"max_products must be 2 or more, got {max_products!r}.")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of the state, or None, not {loss!r}.")
    refuse_keywords(layer.cell, keywords)
    with untouched(layer.cell, (x, context, keywords, z0)):
        return _Measured(layer, x, context, keywords, z0, generator).diagnosis(
            loss, names, int(samples), int(max_products)
        )


class _Measured:
    """A layer's cell at a batch, and the solves of it."""

    def __init__(
        self,
        layer: DEQLayer,
        x: Any,
        context: tuple[Any, ...],
        keywords: dict[str, Any],
        z0: Any,
        generator: torch.Generator | None,
    ):
        x, context, keywords, z0 = map(usable, (x, context, keywords, z0))
        self.cell, self.generator = layer.cell, generator
        self.options = dataclasses.replace(layer.options, on_failure="ignore")
        self.leading = leading_of(self.cell, x)
        if self.leading is not None:
            x, z0 = self.leading.rows(x), self.leading.start(z0)
        if isinstance(x, Tensor):
            x = x.detach()
            if x.is_floating_point() or x.is_complex():
                x = x.requires_grad_()
        self.x, self.context, self.keywords, self.z0 = x, context, keywords, z0
        self.probe = self._layer(self.cell, self.options)
        state = self.probe(x, *context, z0=z0, **keywords)
        self.state = state[0] if self.options.has_aux else state
        solution = self.probe.last_solution
        assert solution is not None
        self.forward: Solution = solution
        self.z = tree_map(torch.Tensor.detach, self.state)
        self.packing = Packing(self.z, self.options.batch_dim)
        self.packing.copies = True

    def diagnosis(
        self,
        loss: Callable[[Any], Tensor] | None,
        names: Names,
        samples: int,
        max_products: int,
    ) -> Diagnosis:
        forward, notes = self.forward, list[str]()
        squares = recurrent_squares(self.cell, names)
        gradients = backward(
            self.probe, self.state, self.packing, self.x, loss, self.generator, squares
        )
        chosen = self._probed(samples)
        radius, norm = self._spectrum(chosen, max_products, notes)
        if not bool(forward.converged.all()) and len(chosen.samples):
            notes.append(
                "samples that did not converge have J taken at their best iterate, which is no "
                "equilibrium."
            )
        if not gradients.parameters:
            notes.append("the cell has no parameters that are known and require gradients.")
        found = Diagnosis(
            name=getattr(self.cell, "__name__", type(self.cell).__name__),
            size=sum(self.packing.sizes),
            tol=self.options.tol,
            max_iter=self.options.max_iter,
            forward=forward if self.leading is None else self.leading.solution(forward),
            adjoint=gradients.adjoint,
            contraction=self._contraction(),
            rate=_rate(forward),
            probed=chosen.samples,
            radius=radius,
            norm=norm,
            gradient_norm=gradients.gradient_norm,
            adjoint_norm=gradients.adjoint_norm,
            parameters=gradients.parameters,
            recurrent=tuple(s.name for s in squares),
            has_loss=loss is not None,
            notes=tuple(notes),
        )
        subject = self._subject(chosen, squares)
        return dataclasses.replace(found, recommendations=advise(found, subject))

    def _layer(self, cell: Any, options: Options) -> DEQLayer:
        layer = DEQLayer(cell)
        layer.options = options
        return layer

    def _bare(self, **others: Any) -> Options:
        """What the layer's options say of the map and of when a sample is done, and ``others``."""
        kept = ("batch_dim", "has_aux", "randomness", "tol", "atol")
        same = {name: getattr(self.options, name) for name in kept}
        return Options(**same, on_failure="ignore", **others)

    def _probed(self, count: int) -> Subset:
        f = CellMap(self.cell, (_detached(self.x), *self.context), self.keywords)
        f.has_aux = self.options.has_aux
        known = torch.nonzero(~self.forward.nonfinite).flatten()
        # Those that did not converge come last.
        rank = self.forward.iterations[known].long()
        rank = rank + (~self.forward.converged[known]) * (rank.max() + 1 if len(rank) else 0)
        return subset(f, self.z, known[spread_over(rank, count)], self.options)

    def _spectrum(
        self, chosen: Subset, max_products: int, notes: list[str]
    ) -> tuple[Estimate, Estimate]:
        if not len(chosen.samples):
            return _unknown(0, chosen.samples), _unknown(0, chosen.samples)
        x, *context = chosen.f.arguments
        options: dict[str, Any] = {"max_products": max_products, "generator": self.generator}
        options |= {"context": tuple(context), **chosen.f.keywords}
        radius = spectral_radius(self.probe, x, chosen.z, **options)
        try:
            return radius, jacobian_norm(self.probe, x, chosen.z, **options)
        except (RuntimeError, NotImplementedError) as error:
            notes.append(f"no 2-norm of J: {str(error).splitlines()[0][:200]}")
            return radius, _unknown(len(radius.value), radius.value)

    def _contraction(self) -> Tensor:
        """Of plain steps, as a general map makes them."""
        most = min(self.options.max_iter, _PLAIN_STEPS)
        layer = self._layer(_General(self.cell), self._bare(solver="picard", max_iter=most))
        with torch.no_grad():
            layer(_detached(self.x), *self.context, z0=self.z0, **self.keywords)
        solution = layer.last_solution
        if solution is None or solution.observed_contraction is None:
            return torch.full_like(self.forward.residual, math.nan)
        seen = solution.observed_contraction
        return torch.where(self.forward.nonfinite, math.nan, seen)

    def _subject(self, chosen: Subset, squares: list[Square]) -> Subject:
        bad = torch.zeros_like(self.forward.status, dtype=torch.bool)
        dims = samples_of(self.x, self.z, self.options.batch_dim)
        if dims is not None and self.x.numel():
            bad = ~(as_rows(self.x.detach(), dims) * 0 == 0).all(1)
        plain = isinstance(self.cell, AffineCell) and self.cell.is_plain()
        structure = self.cell.structure() if plain else None
        bound = None if structure is None else structure.contraction
        trial = None
        if squares and len(chosen.samples) and can_be_scaled(self.cell, squares):
            trial = self._trial(chosen, squares)
        return Subject(
            options=self.options,
            squares=squares,
            trial=trial,
            bad_input=bad & self.forward.nonfinite,
            certified=bound is not None and bound < 1,
            symmetric=structure is not None and "symmetric" in structure.tags,
            fused=plain,
        )

    def _trial(self, chosen: Subset, squares: list[Square]) -> Trial:
        x, *context = chosen.f.arguments
        tried = self._bare(max_iter=self.options.max_iter)

        def trial(factor: float) -> tuple[float, float]:
            layer = self._layer(Scaled(self.cell, squares, factor), tried)
            start = tree_map(torch.zeros_like, chosen.z)
            with torch.no_grad():
                z = layer(x, *context, z0=start, **chosen.f.keywords)
            z = z[0] if tried.has_aux else z
            assert layer.last_solution is not None
            share = float(layer.last_solution.converged.double().mean())
            radius = spectral_radius(
                layer,
                x,
                z,
                context=tuple(context),
                max_products=_TRIAL_PRODUCTS,
                generator=self.generator,
                **chosen.f.keywords,
            )
            return largest(radius.value), share

        return trial


class _General:
    """An affine cell, or any other, as a general map."""

    def __init__(self, cell: Any):
        self._cell = cell
        if hasattr(cell, "initial_state"):
            self.initial_state = cell.initial_state

    def __call__(self, z: Any, *arguments: Any, **keywords: Any) -> Any:
        return self._cell(z, *arguments, **keywords)


def _rate(solution: Solution) -> Tensor:
    """``residual^(1 / updates)``: from a start at zero the first residual is 1."""
    steps, residual = solution.iterations, solution.residual
    rate = residual.clamp(min=0) ** (1 / steps.clamp(min=1).to(residual.dtype))
    known = (steps > 0) & residual.isfinite()
    return torch.where(known, rate, math.nan)


def _unknown(count: int, like: Tensor) -> Estimate:
    nan = torch.full((count,), math.nan, device=like.device)
    none = torch.zeros(count, dtype=torch.int32, device=like.device)
    return Estimate(nan, nan.clone(), nan.clone(), none, none > 0)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x
