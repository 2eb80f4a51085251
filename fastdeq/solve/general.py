"""The path of any cell: its state as rows ``(B, n)``, iterated, and differentiated implicitly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from ..solution import Solution, may_look
from . import autograd
from .checked_maps import CheckedMaps
from .eager import Eagerly
from .iteration import is_compiled
from .packing import ArgumentWrittenError, Packing
from .spec import Report, Specs


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
) -> tuple[Any, Solution]:
    """``z = f(z)`` for f on states like ``z0``. ``report`` receives the adjoint's solution.

    In grad mode samples are seen to be independent, unless ``checked`` knows the map ``known_as``,
    which stands for f.

    Raises:
        BackendError: a backend or precision that cannot be had.
        CoupledSamplesError: a sample depends on another one.
    """
    if specs.options.precision == "mixed":
        raise BackendError(
            "precision='mixed' is not available: only the solve of an AffineCell has it, without "
            "hooks, further arguments and solvers of one's own. Use precision='auto'."
        )
    packing = Packing(z0, specs.options.batch_dim)
    # Only the compiled iteration leaves a point alone that somebody keeps.
    rows = packing.pack(z0)
    packing.copies = rows.is_inference() or not is_compiled(
        specs.forward.solver, specs.options.backend, rows.detach()
    )
    try:
        return _solve(f, rows, packing, specs, report, checked, known_as)
    except ArgumentWrittenError:
        packing.copies = True
    return _solve(f, packing.pack(z0), packing, specs, report, checked, known_as)


def _solve(
    f: Callable[[Any], Any],
    start: Tensor,
    packing: Packing,
    specs: Specs,
    report: Report,
    checked: CheckedMaps,
    known_as: Any,
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
    with torch.no_grad():
        solution = replace(specs.forward, parts=packing.parts).iterate(rows, start, first)
    z = solution.value
    if torch.is_grad_enabled():
        check = checked.check_of(known_as, specs.options.batch_dim, packing.ndims, z)
        if check is not None:
            with Eagerly():
                check(rows)
        if specs.options.gradient == "implicit":
            again = autograd.rerun_autocast(rows, z.device.type)
            adjoint = replace(specs.adjoint, parts=packing.parts)
            attached = autograd.attach(adjoint, report, again, z)
        else:
            attached = autograd.one_step(rows, z)
        if _none(solution.nonfinite):
            z = attached
        else:
            z = torch.where(solution.nonfinite.unsqueeze(1), z, attached)
    else:
        z = z.clone()  # the caller may write to it
    own = replace(
        solution,
        value=packing.unpack(solution.value),
        contraction=specs.structure.contraction,
        batch_dim=specs.options.batch_dim,
    )
    return packing.unpack(z), own
