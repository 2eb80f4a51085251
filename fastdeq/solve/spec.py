"""How a solve and its adjoint run: made once for each layer and structure, and reused.

A spec holds what does not change from call to call: solver, tolerances, precision, backend, and the
engine that was chosen for each device, dtype and shape class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..backends.choose import Request, check_device, require_engine
from ..backends.device import gpu_of
from ..errors import BackendError
from ..ops import anderson_mix, gmres_step
from ..ops.pack_weight import reads_triangle
from ..ops.solve_common import Outputs, expanded_zeros, working_dtype
from ..options import Options
from ..solution import Solution
from ..solvers import SolveOptions, Solver, Structure, resolve
from ..solvers.loop import Follow, finite_rows, solve
from .iteration import is_compiled, iterate
from .packed import PackedWeight
from .shapes_only import has_no_numbers, is_traced
from .trend import Traced
from .unfinished import Unfinished

Map = Callable[[Tensor], Tensor]
#: Hears that an adjoint solve begins, by None, and its solution.
Report = Callable[[Solution | None], None]


def ignore(solution: Solution | None) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True)
class SolveSpec:
    """One solve, forward or adjoint; ``what`` names it in errors."""

    what: str
    solver: Solver
    options: SolveOptions
    arguments: tuple[Any, ...]  # the options for an operator
    backend: str
    bitwise_symmetric: bool
    parts: Sequence[int] | None = None  # sizes of the parts of a row, each to meet the tolerance
    limit: float | None = None  # of an adjoint; see ``adjoint_limit``
    hands_on: bool = False  # whether its solution has ``kept`` for the adjoint
    begin: Any = None  # what the forward solve handed on, as the adjoint's solver begins
    _engines: dict[Any, str] = field(default_factory=dict, repr=False, compare=False)

    def engine(self, rows: Tensor, *others: Tensor | None) -> str:
        """The engine for rows ``(B, d)`` and the other tensors of the solve, chosen once for each
        device, dtype, size and, on a GPU, power of two of the batch.

        Raises:
            BackendError: an explicit backend or precision that cannot be had.
        """
        dtype = working_dtype(rows, *others)
        batch, size = rows.shape
        on_gpu = rows.device.type == "cuda"
        if torch.compiler.is_compiling():
            # A batch may be symbolic here; where it matters the operator chooses when it runs.
            return self.backend if on_gpu else self._choose(rows, dtype, 1)
        if batch == 0 or size == 0:
            check_device(self.backend, rows.device.type)
            return "reference"
        # The choice is that for the largest batch of the class, whichever comes first.
        largest = 1 << (batch - 1).bit_length() if on_gpu else 1
        key = (rows.device, dtype, size, largest)
        found = self._engines.get(key)
        if found is None:
            found = self._engines[key] = self._choose(rows, dtype, largest)
        return found

    @property
    def engines_chosen(self) -> tuple[str, ...]:
        """Names of the engines that were chosen so far."""
        return tuple(self._engines.values())

    def _choose(self, rows: Tensor, dtype: torch.dtype, batch: int) -> str:
        device = rows.device
        request = Request(
            device.type, dtype, rows.shape[1], batch, self.options, self.backend, gpu_of(device)
        )
        return require_engine(request, self.what)

    def forward(
        self,
        weight: Tensor,
        injection: Tensor,
        start: Tensor | None,
        activation: str,
        with_slope: bool,
        packed: Tensor | None = None,
    ) -> Outputs:
        """``ops.solve_affine``."""
        engine = self.engine(injection, weight, start)
        operator = torch.ops.fastdeq.solve_affine.default
        first = (weight, injection, start, activation, with_slope, packed)
        how = (self.bitwise_symmetric, engine, *self.arguments)
        return operator(*first, *how)  # type: ignore[no-any-return]

    def adjoint(
        self, weight: Tensor, slope: Tensor, grad: Tensor, packed: Tensor | None, report: Report
    ) -> Tensor:
        """``ops.solve_affine_adjoint``, its solution reported."""
        engine = self.engine(grad, weight, slope)
        operator = torch.ops.fastdeq.solve_affine_adjoint.default
        tensors = (weight, slope, grad, packed, self.bitwise_symmetric)
        outputs = operator(*tensors, engine, *self.arguments)
        if not is_traced(outputs[0]):  # a traced backward pass may not touch the layer
            report(self.solution(outputs))
        q: Tensor = outputs[0]
        return q

    def solution(self, outputs: Outputs, contraction: float | None = None) -> Solution:
        """The outputs of an operator as a :class:`fastdeq.Solution`."""
        value, status, iterations, residual, rejects, *_ = outputs
        counters = dict(zip(self.solver.rejects, rejects.unbind(1), strict=True))
        found = (value.detach(), status, iterations, residual, counters, contraction)
        return Solution(*found, solver=self.solver, path="fused")

    def iterate(self, f: Map, start: Tensor, first: Map | None = None) -> Solution:
        """Solves ``z = f(z)``, f a map of rows ``(B, n)``; ``first`` makes the first evaluation,
        where that is another way to the same value. Between two evaluations runs one call of
        compiled code, or plain PyTorch. An ``Unfinished`` map is told what has finished.

        What f sees is the memory of the iteration; see ``iteration.iterate``. Rows without numbers,
        fake or on the meta device, are evaluated once: for shapes.
        """
        first = first or f
        if has_no_numbers(start):
            return self._shapes(first(start))
        check_device(self.backend, start.device.type)
        reason = self.options.why_plain_pytorch
        if reason and self.backend not in ("auto", "reference"):
            raise BackendError(
                f"backend={self.backend!r} is not available for this {self.what}: {reason}. "
                "Available here: 'auto', 'reference'."
            )
        compiled = self.is_compiled(start)
        first, follow, finish = _followed(f, first, own_memory=not compiled)
        if compiled:
            how = (self.solver, self.options, self.parts)
            return finish(iterate(f, start, *how, first, follow=follow, backend=self.backend))
        traced = None
        if hasattr(self.solver, "window") and not torch.compiler.is_compiling():
            traced = Traced(self.solver, self.options.max_iter)
        start = finite_rows(start)
        solution = solve(
            f,
            start,
            traced or self.solver,  # type: ignore[arg-type]
            tol=self.options.tol,
            max_iter=self.options.max_iter,
            atol=self.options.atol,
            patience=self.options.patience,
            parts=self.parts,
            anderson_mix=anderson_mix.implementation(self.backend, start.device),
            gmres_step=gmres_step.implementation(self.backend),
            start_value=first(start) if start.shape[0] else None,
            follow=follow,
            min_iter=self.options.min_iter,
            stop_norm=self.options.stop_norm,
            begin=self.begin,
            hands_on=self.hands_on,
        )
        return finish(replace(solution, solver=self.solver, trend=traced))

    def is_compiled(self, start: Tensor) -> bool:
        """Whether compiled code iterates from rows like ``start`` ``(B, n)``."""
        if self.options.min_iter and (start.device.type != "cpu" or self.backend == "triton"):
            return False  # the kernels do not know it
        if self.options.why_plain_pytorch:
            return False
        return is_compiled(self.solver, self.backend, start)

    def iterate_affine(
        self, f: Callable[[Tensor], Tensor | None], offset: Tensor, scale: Tensor
    ) -> Solution:
        """Solves ``z = f(z) + scale offset`` for a linear f, which returns None for zeros, offset
        ``(B, n)`` and scale ``(B,)``, from zeros, where it :meth:`is_compiled`."""
        zeros = expanded_zeros(offset)
        _, follow, finish = _followed(f, f, own_memory=False)
        how = (self.solver, self.options, self.parts)
        solution = iterate(f, zeros, *how, _no_value, offset, scale, self.backend, follow)
        return finish(without_first(solution))

    def _shapes(self, rows: Tensor) -> Solution:
        count = rows.new_empty(len(rows), dtype=torch.int32)
        return Solution(
            torch.empty_like(rows),
            rows.new_empty(len(rows), dtype=torch.int8),
            count,
            rows.new_empty(len(rows)),
            {name: count.clone() for name in self.solver.rejects},
            path="general",
        )


def _no_value(point: Tensor) -> None:
    """The value of a linear map at zeros, as one that is zero."""


def without_first(solution: Solution) -> Solution:
    """The solution of a linear map, whose first value, at zeros, takes no product."""
    return (
        with_evaluations(solution, -1, -len(solution.status)) if solution.evaluations else solution
    )


def with_evaluations(solution: Solution, more: int, samples: int) -> Solution:
    """The solution with so many more evaluations of so many samples in all."""
    made = (solution.evaluations or 0) + more, (solution.sample_evaluations or 0) + samples
    return replace(solution, evaluations=made[0], sample_evaluations=made[1])


def _followed(
    f: object, first: Any, own_memory: bool
) -> tuple[Any, Follow | None, Callable[[Solution], Solution]]:
    """How the first evaluation of a solve of f is made, what is to hear which samples go on, and
    what counts the evaluations."""
    if not isinstance(f, Unfinished):
        return first, None, lambda solution: solution
    f.own_memory = own_memory
    return f.first(first), f.follow, f.counted


class Specs:
    """A solve and its adjoint for a map of ``structure``, the latter made when it is first needed.

    Raises:
        ValueError: a solver that needs more structure than there is.
    """

    def __init__(self, options: Options, structure: Structure):
        self.options, self.structure = options, structure
        solver = resolve(options.solver, structure, options.tol, adjoint=False)
        limits = ("tol", "atol", "min_iter", "max_iter")
        forward = self._spec("solve", solver, {k: getattr(options, k) for k in limits})
        self.forward = replace(forward, hands_on=getattr(options.adjoint, "reuse", False))
        self._adjoint: SolveSpec | None = None
        self._packed = PackedWeight()
        self.plans: dict[Any, Any] = {}
        """What the compiled extension has prepared; see ``affine.plan_for``."""
        self.wrapped: bool | None = None
        """Whether the cell contains an affine one; see ``why_general``."""
        self.refusals: set[Any] = set()
        """Calls in which samples could not be told apart; see ``compaction.Compaction``."""

    @property
    def adjoint(self) -> SolveSpec:
        if self._adjoint is None:
            limits = self.options.adjoint_limits()
            solver = resolve(self.options.adjoint, self.structure, limits["tol"], adjoint=True)
            spec = self._spec("adjoint solve", solver, limits)
            self._adjoint = replace(spec, limit=self.options.adjoint_limit)
        return self._adjoint

    def packed_weight(self, weight: Tensor, rows: Tensor, start: Tensor | None) -> Tensor | None:
        """A symmetric weight as the engine of solves of ``rows`` ``(B, d)`` and their adjoints
        reads it; None where it would not use that."""
        if (
            not self.structure.bitwise_symmetric
            or weight.device.type != "cpu"
            or working_dtype(rows, start) != working_dtype(weight)
            or self.forward.engine(rows, weight, start) != "cpp"
        ):
            return None
        size, precision = weight.shape[0], self.options.precision
        if torch.compiler.is_compiling():
            from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow

            if statically_known_true(reads_triangle(rows.shape[0], size, precision)):
                return None  # a batch that may be larger packs
            packed: Tensor = torch.ops.fastdeq.pack_weight(weight.detach(), precision)
            return packed
        if reads_triangle(rows.shape[0], size, precision):
            return None
        return self._packed.of(weight, precision)

    def _spec(self, what: str, solver: Solver, limits: dict[str, Any]) -> SolveSpec:
        options = self.options
        how = SolveOptions.of(
            solver,
            patience=options.patience,
            precision=options.precision,
            stop_norm=options.stop_norm,
            **limits,
        )
        symmetric = self.structure.bitwise_symmetric
        return SolveSpec(what, solver, how, how.arguments, options.backend, symmetric)
