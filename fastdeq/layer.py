"""``DEQLayer``: options, warm start, bookkeeping of solutions. No numerics."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from .backends.choose import Backend
from .cells import AffineCell, plain_tensor
from .errors import explain_call, lists_options
from .options import AdjointName, Gradient, Options, Precision, SolverName, State
from .solution import OnFailure, Solution, Status, may_look
from .solve.affine import linear_parameters, plan_for, solve_affine
from .solve.eager import outside_graphs
from .solve.general import solve_map
from .solve.record import Record
from .solve.spec import Specs
from .solvers import Solver, Structure
from .solvers.picard import CERTIFIED


class DEQLayer(nn.Module):
    """Outputs the state ``z*`` that solves ``z = cell(z, x)``, with its implicit gradient.

    Args:
        cell: an :class:`AffineCell`, which is fused, or any module or function ``cell(z, x)`` that
            returns a state like z (a tensor ``(B, ...)`` or a tuple of them) and treats samples
            independently. It may define ``initial_state(x)``.
        solver: "auto", "picard", "anderson", "heavy_ball", "energy" (symmetric cells), or an
            object such as ``Anderson(window=8)``.
        adjoint: solver of the gradient's linear system: "auto", "neumann", "gmres", "anderson",
            "picard", "heavy_ball", "minres" (symmetric cells), or an object.
        gradient: "implicit" (exact at the equilibrium, differentiable again) or "one_step" (the
            gradient of one application of the cell, biased and cheap).
        tol: a sample has converged where ``|f(z) - z| <= atol + tol |f(z)|``, 2-norms; each part
            of a state with several. The error is about ``|f(z) - z| / (1 - contraction)``.
        adjoint_tol: the same for the adjoint; None: ``tol``.
        atol: see ``tol``; for equilibria near zero, which no relative tolerance reaches soon.
        adjoint_atol: the same for the adjoint, next to a right-hand side scaled to norm 1.
        max_iter: most updates of a sample; one further evaluation verifies the last of them. A
            solver with ``fixed_iterations`` has its own count.
        adjoint_max_iter: the same for the adjoint; None: ``max_iter``.
        patience: iterates in a row without progress after which a sample is given up, in both
            directions; None: the solver's own, half of ``max_iter`` for most, 50 at least.
        precision: of the products inside the solve of a float32 :class:`AffineCell`. "auto": early
            iterations with 8-bit and bfloat16 products where the processor has them and they are
            faster, on a GPU bfloat16 ones from 512 features on; "float32": none; "mixed": at any
            size, or an error. Every reported residual, and every iterate returned, is verified by a
            float32 product.
        backend: "auto", or "reference", "cpp", "triton", "cuda" to insist on one implementation of
            the fused operations.
        on_failure: when samples do not converge: "warn" (once per layer for each direction),
            "raise" (``ConvergenceError``) or "ignore". Not looked at inside ``torch.compile``.

    Attributes:
        last_solution, last_adjoint_solution: the :class:`Solution` of the latest forward and
            backward solve, or None.

    Gradients follow grad mode, never ``self.training``.

    Raises:
        TypeError, ValueError: options or input that do not fit, with what does.
        BackendError: a backend or precision that cannot be had for the input.
    """

    _specs: Specs | None = None
    _record: Record

    @lists_options("DEQLayer")
    def __init__(
        self,
        cell: Any,
        *,
        solver: SolverName | Solver = "auto",
        adjoint: AdjointName | Solver = "auto",
        gradient: Gradient = "implicit",
        tol: float = 1e-4,
        adjoint_tol: float | None = None,
        atol: float = 0.0,
        adjoint_atol: float = 0.0,
        max_iter: int = 100,
        adjoint_max_iter: int | None = None,
        patience: int | None = None,
        precision: Precision = "auto",
        backend: Backend = "auto",
        on_failure: OnFailure = "warn",
    ):
        super().__init__()
        if not callable(cell) or isinstance(cell, type):
            raise TypeError(f"cell must be a module or function cell(z, x), not {cell!r}.")
        self.cell = cell
        self.options = Options(
            solver=solver,
            adjoint=adjoint,
            gradient=gradient,
            tol=tol,
            adjoint_tol=adjoint_tol,
            atol=atol,
            adjoint_atol=adjoint_atol,
            max_iter=max_iter,
            adjoint_max_iter=adjoint_max_iter,
            patience=patience,
            precision=precision,
            backend=backend,
            on_failure=on_failure,
        )
        self._record = Record()

    def forward(self, x: Any, *context: Any, z0: Any = None) -> Any:
        """The equilibrium for x; further arguments go to the cell after x.

        A sample of a tensor x that is not finite ends NONFINITE: it returns zeros, gets and
        gives a zero gradient, and the other samples are solved as if it were absent.

        Args:
            x: what the cell takes; for an :class:`AffineCell` ``(B, in_features)``.
            context: further arguments of a general cell.
            z0: start of the solve, shaped like the state; default ``cell.initial_state(x)`` where
                that exists, else zeros: ``(B, features)`` or, for a general cell, shaped like x.
        """
        if z0 is not None and getattr(self.options.solver, "fixed_iterations", 0) == CERTIFIED:
            raise ValueError(
                'fixed_iterations="certified" counts from a start at zero; leave out z0, or give '
                "the number of iterations."
            )
        if not context and self.options.registered:
            cell = self.cell
            if isinstance(cell, AffineCell) and cell.is_plain():
                return self._solve_affine(cell, x, z0)
        return self._solve_general(x, context, z0)

    @outside_graphs
    def _solve_general(self, x: Any, context: tuple[Any, ...], z0: Any) -> Any:
        finite = None
        start = self._start(x) if z0 is None else z0
        if isinstance(x, Tensor) and _batch_of(start) == x.shape[:1]:
            x, finite = _finite_samples(x)
        specs, report = self._specs_for(self._structure()), self._record.receive_adjoint
        try:
            z, solution = solve_map(
                lambda state: self.cell(state, x, *context), start, specs, report
            )
        except TypeError as error:
            explain_call(self.cell, context, error)
            raise
        if finite is not None:
            z, solution = _mark_nonfinite(z, solution, ~finite)
        self._record.forward = solution
        self._record.judge_forward()
        return z

    if TYPE_CHECKING:  # a module's call is of type Any: the state is of the kind of its start

        @overload
        def __call__(self, x: Any, *context: Any, z0: None = None, **more: Any) -> Any: ...
        @overload
        def __call__(self, x: Any, *context: Any, z0: State, **more: Any) -> State: ...
        def __call__(self, x: Any, *context: Any, z0: Any = None, **more: Any) -> Any: ...

    def _solve_affine(self, cell: AffineCell, x: Any, z0: Any) -> Tensor:
        record = self._record
        specs = self._specs_for(cell.structure())
        weight = cell.recurrent_weight()
        linear = None if torch.compiler.is_compiling() else linear_parameters(cell.injection)
        if linear is not None and type(cell) is AffineCell:
            plan = plan_for(specs, weight, cell.activation)
            if plan is not None:
                z: Tensor | None = plan.solve(record, weight, x, *linear, z0)
                if z is not None:
                    return z
        x, finite = _finite_samples(cell.checked_input(x))
        injection = cell.injection_of(x)  # x is checked, and nothing is overridden
        start = None if z0 is None else cell.check_state(z0, injection).detach()
        z, record.forward = solve_affine(
            weight, injection, start, cell.activation, specs, record.receive_adjoint, finite
        )
        record.judge_forward()
        return z

    @property
    def last_solution(self) -> Solution | None:
        """The :class:`Solution` of the latest forward solve, or None."""
        return self._record.solution("forward")

    @last_solution.setter
    def last_solution(self, solution: Solution | None) -> None:
        self._record.forward = solution

    @property
    def last_adjoint_solution(self) -> Solution | None:
        """The :class:`Solution` of the latest backward solve, or None."""
        return self._record.solution("adjoint")

    @last_adjoint_solution.setter
    def last_adjoint_solution(self, solution: Solution | None) -> None:
        self._record.adjoint = solution

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

    def _start(self, x: Any) -> Any:
        if hasattr(self.cell, "initial_state"):
            return self.cell.initial_state(x)
        if isinstance(x, Tensor):
            return torch.zeros_like(x)
        raise TypeError(
            f"no start for the solve: x is a {type(x).__name__}, so pass z0=..., or define "
            "initial_state(x) on the cell."
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without the record of past solves."""
        state = self.__dict__.copy()
        state["_record"] = Record()
        state.pop("_specs", None)
        return state

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._record = Record(self._record.warned)  # each replica solves a part of its own
        return replica

    def extra_repr(self) -> str:
        o = self.options
        return f"solver={o.solver!r}, adjoint={o.adjoint!r}, tol={o.tol:g}, max_iter={o.max_iter}"


def _batch_of(state: Any) -> tuple[int, ...]:
    """``(B,)`` of a state, or () where it is none; the solve will say so."""
    first = state[0] if isinstance(state, (tuple, list)) and state else state
    return tuple(first.shape[:1]) if isinstance(first, Tensor) else ()


def _is_surely_finite(x: Tensor) -> bool:
    """Whether all of x is finite, where that can be seen without waiting for a device."""
    # A sum is finite only where every entry is.
    return x.device.type == "cpu" and may_look(x) and math.isfinite(x.detach().sum().item())


def _finite_samples(x: Any) -> tuple[Any, Tensor | None]:
    """x with non-finite samples zeroed, and which are finite ``(B,)``; None where it is known that
    all are, or x is no tensor of samples."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
        return x, None
    if _is_surely_finite(x):
        return x, None
    finite = (x.detach() * 0) == 0
    if x.dim() > 1:
        finite = finite.flatten(1).all(1)
    zeroed = torch.where(finite.view((-1,) + (1,) * (x.dim() - 1)), x, 0.0)
    return zeroed, plain_tensor(finite)


def _mark_nonfinite(z: Any, solution: Solution, bad: Tensor) -> tuple[Any, Solution]:
    """z and solution with the samples ``bad`` ``(B,)`` reported NONFINITE and set to zero."""

    def zero(part: Tensor) -> Tensor:
        return torch.where(bad.view((-1,) + (1,) * (part.dim() - 1)), 0.0, part)

    def each(state: Any) -> Any:
        return tuple(map(zero, state)) if isinstance(state, tuple) else zero(state)

    marked = dataclasses.replace(
        solution,
        value=each(solution.value),
        status=torch.where(bad, int(Status.NONFINITE), solution.status).to(torch.int8),
        iterations=torch.where(bad, 0, solution.iterations),
        residual=torch.where(bad, torch.inf, solution.residual),
    )
    return each(z), marked
