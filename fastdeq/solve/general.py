"""The path of any cell: its state as rows ``(B, n)``, iterated, and differentiated implicitly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..gradients import Reversible
from ..solution import Solution, may_look
from . import autograd, reversible, tracked_steps, transformed
from .along import Along
from .cell_map import CellMap
from .checked_maps import CheckedMaps
from .compaction import Compaction
from .eager import Eagerly
from .low_precision import Latest, full_part, has_low_precision, in_bfloat16, low_part, together
from .packing import ArgumentWrittenError, Packing
from .shapes_only import has_no_numbers
from .spec import Map, Report, SolveSpec, Specs, with_evaluations
from .unfinished import NOT_TOLD_APART, Unfinished


def _none(samples: Tensor) -> bool:
    """Whether it is known, without waiting for a device, that there is none of these."""
    return samples.device.type == "cpu" and may_look(samples) and not bool(samples.any())


def solve_map(
    f: Callable[[Any], Any],
    z0: Any,
    specs: Specs,
    report: Report,
    checked: CheckedMaps,
    known_as: Any,
    along: Along | None = None,
) -> tuple[Any, Solution]:
    """``z = f(z)`` for f on states like ``z0``. ``report`` receives the adjoint's solution, and
    ``along`` states on the way.

    In grad mode samples are seen to be independent, unless ``checked`` knows the map ``known_as``,
    which stands for f.

    Raises:
        BackendError: a backend or precision that cannot be had.
        CoupledSamplesError: a sample depends on another one.
    """
    if transformed.is_active():
        if along is not None:
            raise ValueError("states along a solve cannot be had under torch.func transforms.")
        return transformed.solve_map_under_transforms(f, z0, specs, report)
    packing = Packing(z0, specs.options.batch_dim)
    # Only the compiled iteration leaves a point alone that somebody keeps.
    rows = packing.pack(z0)
    packing.copies = rows.is_inference() or not specs.forward.is_compiled(rows.detach())
    try:
        return _solve(f, rows, packing, specs, report, checked, known_as, along)
    except ArgumentWrittenError:
        packing.copies = True
    return _solve(f, packing.pack(z0), packing, specs, report, checked, known_as, along)


def _solve(
    f: Callable[[Any], Any],
    start: Tensor,
    packing: Packing,
    specs: Specs,
    report: Report,
    checked: CheckedMaps,
    known_as: Any,
    along: Along | None,
) -> tuple[Any, Solution]:
    rows = packing.rowwise(f)

    def first(point: Tensor) -> Tensor:
        # Under autograd: what the cell caches then (as in torch.nn.utils.parametrize.cached) keeps
        # its graph for the evaluation that is differentiated.
        if not differentiable:
            return rows(point)
        with torch.enable_grad(), Eagerly():
            return rows(point).detach()

    differentiable = torch.is_grad_enabled()
    gradient, ends = specs.options.gradient, None
    kept = f.pinned() if differentiable and isinstance(f, CellMap) else f
    later = packing.rowwise(kept)  # for what is evaluated when gradients are asked for
    compaction = _compaction_of(kept, packing, specs)
    if isinstance(gradient, Reversible) and not has_no_numbers(start):
        spec = replace(specs.forward, parts=packing.parts)
        solution, ends = reversible.solve(rows, start, spec, gradient, first)
    else:
        with torch.no_grad():
            watched = rows if along is None else along.watching(rows)
            solution = _iterate(watched, start, first, compaction, packing, specs)
    z = solution.value

    def attach(solution: Solution) -> Tensor:
        z: Tensor = solution.value
        if not differentiable:
            return z.clone()  # the caller may write to it
        around = autograd.autocast_of_now(z.device.type)
        if gradient == "implicit":
            parts = None if compaction is None else compaction.parts(around)
            adjoint = replace(specs.adjoint, parts=packing.parts)
            adjoint = autograd.begun_after(adjoint, solution)
            attached = autograd.attach(adjoint, report, around(later), z, parts)
        elif ends is not None:
            attached = reversible.attach(around(later), ends, specs.adjoint, report)
        elif gradient == "one_step" or has_no_numbers(z):
            attached = autograd.one_step(later, z)
        else:
            attached = tracked_steps.attach(gradient, later, start, solution)
        if _none(solution.nonfinite):
            return attached
        return torch.where(solution.nonfinite.unsqueeze(1), z, attached)

    if differentiable:
        check = checked.check_of(known_as, specs.options.batch_dim, packing.ndims, z)
        if check is not None:
            with Eagerly():
                check(rows)
    if along is not None:
        along.finish(solution, attach, packing.unpack)
    z = attach(solution)
    own = replace(
        solution,
        value=packing.unpack(solution.value),
        kept=None,
        contraction=specs.structure.contraction,
        batch_dim=specs.options.batch_dim,
    )
    return packing.unpack(z), own


def _compaction_of(f: Any, packing: Packing, specs: Specs) -> Compaction | None:
    options = specs.options
    if not options.compact or not isinstance(f, CellMap) or packing.batch < 2:
        return None
    return Compaction(f, packing, options.compact, options.tol, specs.refusals)


def _iterate(
    rows: Map,
    start: Tensor,
    first: Map,
    compaction: Compaction | None,
    packing: Packing,
    specs: Specs,
) -> Solution:
    spec = replace(specs.forward, parts=packing.parts)
    low = None
    if specs.options.precision == "mixed" and has_low_precision(packing):
        low = low_part(spec)
    if low is None:
        return _unfinished(spec, rows, start, first, compaction)
    values = Latest(in_bfloat16(rows, packing.device.type))
    begun = values.stepped(low.iterate(values, start, first), spec.options)
    rest = _unfinished(full_part(spec, begun), rows, begun.value, rows, compaction)
    return together(begun, rest)


def _unfinished(
    spec: SolveSpec, rows: Map, start: Tensor, first: Map, compaction: Compaction | None
) -> Solution:
    """The solution, with finished samples left out, and confirmed by a value for all samples: if it
    is not, the solve goes on from there with all."""
    if compaction is None:
        return spec.iterate(rows, start, first)
    if compaction.refused:
        return replace(spec.iterate(rows, start, first), path=NOT_TOLD_APART)
    f = Unfinished(rows, compaction.narrow, len(start), asks_value=True)
    solution = spec.iterate(f, start, first)
    if not f.left_out:
        return solution
    value = rows(solution.value)
    if compaction.confirms(solution, value):
        return with_evaluations(solution, 1, len(start))
    compaction.refuse()
    again = spec.iterate(rows, solution.value, lambda _: value)
    made = (solution.evaluations or 0, solution.sample_evaluations or 0)
    return replace(with_evaluations(again, *made), path=NOT_TOLD_APART)
