"""What a layer remembers between calls: its solutions, how to solve, and which maps it saw to be
independent."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cells import AffineCell
from ..options import Options
from ..solution import Solution
from ..solvers import Structure
from ..weights.square import Names
from .checked_maps import CheckedMaps
from .record import OnSolution, Record, check_watching, new_record
from .spec import Specs

if TYPE_CHECKING:  # a solve does not need it
    from ..diagnosis import Diagnosis


class Recorded(nn.Module):
    """A module with a record of its solves, which copies, pickles and replicas start anew."""

    cell: Any
    options: Options
    keep_solutions: int
    on_solution: OnSolution | None
    _specs: Specs | None = None
    _record: Record
    _checked: CheckedMaps
    _original_cell: tuple[Any, ...] = ()  # of the layer that a replica stands for

    def _watch(self, keep_solutions: int, on_solution: OnSolution | None) -> None:
        self.keep_solutions, self.on_solution = check_watching(keep_solutions, on_solution)
        self._record = new_record(self.keep_solutions, self.on_solution)
        self._checked = CheckedMaps()

    def _plain(self) -> bool:
        return isinstance(self.cell, AffineCell) and self.cell.is_plain()

    def _structure(self) -> Structure:
        if not self._plain():
            return Structure()
        structure: Structure = self.cell.structure()
        return dataclasses.replace(structure, affine=False)  # not solved as one here

    def _specs_for(self, structure: Structure) -> Specs:
        """How to solve a map of ``structure``: made once, for as long as cell and options stay."""
        if torch.compiler.is_compiling():
            return Specs(self.options, structure)
        found = self._specs
        if (
            found is None
            or found.options is not self.options
            or (found.structure is not structure and found.structure != structure)
        ):
            found = self._specs = Specs(self.options, structure)
        self._record.on_failure = self.options.on_failure
        return found

    @property
    def last_solution(self) -> Solution | None:
        """The :class:`Solution` of the latest forward solve, or None."""
        return self._record.solution("forward")

    @last_solution.setter
    def last_solution(self, solution: Solution | None) -> None:
        self._record.put("forward", solution)

    @property
    def solutions(self) -> dict[str, list[Solution]]:
        """The latest ``keep_solutions`` of each direction, "forward" and "adjoint", oldest first,
        without their values."""
        return self._record.kept()

    @property
    def last_adjoint_solution(self) -> Solution | None:
        """The :class:`Solution` of the latest backward solve, or None."""
        return self._record.solution("adjoint")

    @last_adjoint_solution.setter
    def last_adjoint_solution(self, solution: Solution | None) -> None:
        self._record.put("adjoint", solution)

    def diagnose(
        self,
        x: Any,
        /,
        *context: Any,
        z0: Any = None,
        loss: Callable[[Any], Tensor] | None = None,
        names: Names = None,
        samples: int = 8,
        max_products: int = 100,
        generator: torch.Generator | None = None,
        **keywords: Any,
    ) -> Diagnosis:
        """How this layer solves a batch and is differentiated, and what to change: a
        :class:`fastdeq.diagnostics.Diagnosis`, which prints as a table.

        It solves the batch with the options of the layer, takes plain steps from the same start,
        probes the Jacobian of some samples, and solves one adjoint. The layer is left as it was:
        its solutions, mode, buffers, gradients and the state of random numbers.

        Args:
            x: what the layer takes.
            context: further arguments of the cell.
            z0: start of the solve.
            loss: a function of the state that returns one number; None: random directions of unit
                norm, and the mean over the samples.
            names: which square weights the state runs through, as in :mod:`fastdeq.init`; None:
                all, those of W for an :class:`fastdeq.AffineCell`.
            samples: most samples to probe for the spectrum of J.
            max_products: most products with J of a sample, >= 2.
            generator: of random directions; None: fixed ones.
            keywords: of the cell, by name.

        Raises:
            TypeError, ValueError: what the layer raises for such arguments; options out of range.
        """
        measure = importlib.import_module("fastdeq.diagnostics.measure")
        found: Diagnosis = measure.diagnose(
            self,
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
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without the record of past solves and checks."""
        state = self.__dict__.copy()
        state["_record"] = new_record(self.keep_solutions, self.on_solution)
        state["_checked"] = CheckedMaps()
        state.pop("_specs", None)
        return state

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        # Each replica solves a part of its own.
        replica._record = new_record(self.keep_solutions, self.on_solution, self._record.warned)
        replica._original_cell = self._original_cell or (self.cell,)
        return replica
