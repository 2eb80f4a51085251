"""What a layer remembers between calls: its solutions, how to solve, and which maps it saw to be
independent."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ..cells import AffineCell
from ..options import Options
from ..solution import Solution
from ..solvers import Structure
from .checked_maps import CheckedMaps
from .record import OnSolution, Record, check_watching, new_record
from .spec import Specs


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
