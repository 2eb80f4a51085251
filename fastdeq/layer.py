"""``DEQLayer``: options, warm start, bookkeeping of solutions. No numerics."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from .backends.choose import Backend
from .cells import AffineCell
from .errors import explain_call, lists_options
from .failure import OnFailure
from .gradients import Gradient, GradientMethod
from .options import (
    AdjointName,
    BatchDim,
    Compact,
    Options,
    Precision,
    Randomness,
    SolverName,
    State,
    StopNorm,
)
from .solve.affine import linear_parameters, plan_for, solve_affine
from .solve.along import Along
from .solve.arguments import NOT_GIVEN, check_cell, input_of, refuse_keywords
from .solve.cell_map import CellMap
from .solve.eager import outside_graphs
from .solve.general import solve_map
from .solve.leading import Leading, LeadingRecord, leading_of
from .solve.nonfinite import finite_samples, mark_nonfinite, samples_of, zeroed
from .solve.record import OnSolution
from .solve.recorded import Recorded
from .solve.sharding import refuse_sharded
from .solve.start import EXPLAINED, check_start, explain_start, refuse_batch_dim, start_for
from .solve.why_general import why_general
from .solvers import Solver


class DEQLayer(Recorded):
    """Outputs the state ``z*`` that solves ``z = cell(z, x)``, with its implicit gradient.

    Args:
        cell: an :class:`AffineCell`, which is fused, or any module or function ``cell(z, x)`` that
            returns a state like z (a tensor or a structure of them, real or complex) and treats
            samples independently. It may define ``initial_state(x)``.
        solver: "auto", "picard", "anderson", "broyden", "newton_krylov", "heavy_ball", "energy"
            (symmetric cells), "peaceman_rachford" (affine cells with I - W monotone), or an object
            such as ``Anderson(window=8)``.
        adjoint: solver of the gradient's linear system: "auto", "neumann", "gmres", "bicgstab",
            "anderson", "picard", "broyden", "heavy_ball", "minres" (symmetric cells), or an object.
        gradient: "implicit" (exact at the equilibrium, differentiable again) or "one_step" (the
            gradient of one application of the cell, biased and cheap); "phantom", "truncated",
            "unrolled", "reversible", or an object such as ``Phantom(steps=5, damping=0.5)``, which
            return the end of the steps that they differentiate: docs/gradients.md.
        adjoint_limit: most that the adjoint of a sample may exceed its incoming gradient by, in
            2-norms; larger ones are scaled down to it and counted in ``Solution.limited``. None:
            any. For samples near a singular ``I - J``.
        batch_dim: which dimension of the state counts samples, the same in each of its parts: an
            int, 1 for ``(T, B, d)``; a tuple for several, ``(0, 1)`` for T * B samples; None where
            all of the state is one sample (the nodes of a graph, a vector, batch normalisation in
            training mode), as one of numbers without dimensions always is. Negative ones count
            from the back. An :class:`AffineCell` has 0, and each vector is a sample.
        compact: whether a general cell is evaluated only for the samples that are not finished,
            whenever these are half of those evaluated so far or fewer. Arguments of the cell whose
            size is that of the batch in dimension ``batch_dim`` count samples; a tuple says it for
            each, x first: ``(0, None)`` where the second is shared. Values for a part are compared
            with those for all before they are relied on, and one for all confirms the result; where
            they differ a warning says so, once, and all are evaluated. Fused solves always do so.
        has_aux: whether the cell returns ``(state, aux)``; the layer then returns ``(z, aux)``, aux
            being that of one further evaluation, at z, with its gradient.
        randomness: "different": each evaluation of the cell draws anew; "same": those of one solve
            and its gradient draw the same numbers (dropout masks, noise), and each solve others.
        tol: a sample has converged where ``|f(z) - z| <= atol + tol |f(z)|``, 2-norms; each part
            of a state with several. The error is about ``|f(z) - z| / (1 - contraction)``.
        adjoint_tol: the same for the adjoint; None: ``tol``.
        atol: see ``tol``; for equilibria near zero, which no relative tolerance reaches soon.
        adjoint_atol: the same for the adjoint, next to a right-hand side scaled to norm 1.
        stop_norm: "2", or "max" for largest entries instead of 2-norms, in plain PyTorch.
        min_iter: no sample of the forward solve converges before so many updates.
        max_iter: most updates of a sample; one further evaluation verifies the last of them. A
            solver with ``fixed_iterations`` has its own count.
        adjoint_max_iter: the same for the adjoint; None: ``max_iter``.
        patience: iterates in a row without progress after which a sample is given up, in both
            directions; None: the solver's own, half of ``max_iter`` for most, 50 at least.
        precision: of the products inside the solve of a float32 :class:`AffineCell`. "auto": early
            iterations with 8-bit and bfloat16 products where the processor has them and they are
            faster, on a GPU bfloat16 ones from 512 features on; "float32": none; "mixed": at any
            size, or an error. A general cell with "mixed" is evaluated under autocast in bfloat16
            until its residuals reach 2**-7, in the forward solve. Every reported residual, and
            every iterate returned, is verified in float32.
        backend: "auto", or "reference", "cpp", "triton", "cuda" to insist on one implementation of
            the fused operations.
        on_failure: when samples do not converge: "warn" (once per layer for each direction),
            "raise" (``ConvergenceError``) or "ignore". Not looked at inside ``torch.compile``.
        keep_solutions: how many solutions of each direction :attr:`solutions` remembers.
        on_solution: a function of "forward" or "adjoint" and a :class:`Solution`, called after each
            solve, before ``on_failure``; not inside ``torch.compile``.

    Attributes:
        last_solution, last_adjoint_solution: the :class:`Solution` of the latest forward and
            backward solve, or None.

    Per-sample results are ``(B,)`` over the samples, in row-major order of the batch dimensions; B
    is 1 with ``batch_dim=None``. That samples are independent is looked at once, at the first call
    in grad mode with two of them or more, and again for another cell or ``batch_dim``, other
    modules of it in training mode, or a state with another number of dimensions; not without grad
    mode nor inside ``torch.compile``. Copies and unpickled layers look again.

    Gradients follow grad mode, never ``self.training``.

    Raises:
        TypeError, ValueError: options or input that do not fit, with what does.
        CoupledSamplesError: a sample depends on another; a ValueError.
        BackendError: a backend or precision that cannot be had for the input.
    """

    @lists_options("DEQLayer")
    def __init__(
        self,
        cell: Any,
        *,
        solver: SolverName | Solver = "auto",
        adjoint: AdjointName | Solver = "auto",
        gradient: Gradient | GradientMethod = "implicit",
        adjoint_limit: float | None = None,
        batch_dim: BatchDim = 0,
        compact: Compact = False,
        has_aux: bool = False,
        randomness: Randomness = "different",
        tol: float = 1e-4,
        adjoint_tol: float | None = None,
        atol: float = 0.0,
        adjoint_atol: float = 0.0,
        stop_norm: StopNorm = "2",
        min_iter: int = 0,
        max_iter: int = 100,
        adjoint_max_iter: int | None = None,
        patience: int | None = None,
        precision: Precision = "auto",
        backend: Backend = "auto",
        on_failure: OnFailure = "warn",
        keep_solutions: int = 0,
        on_solution: OnSolution | None = None,
    ):
        super().__init__()
        check_cell(cell, has_aux)
        self.cell = cell
        self.options = Options(
            solver=solver,
            adjoint=adjoint,
            gradient=gradient,
            adjoint_limit=adjoint_limit,
            batch_dim=batch_dim,
            compact=compact,
            has_aux=has_aux,
            randomness=randomness,
            tol=tol,
            adjoint_tol=adjoint_tol,
            atol=atol,
            adjoint_atol=adjoint_atol,
            stop_norm=stop_norm,
            min_iter=min_iter,
            max_iter=max_iter,
            adjoint_max_iter=adjoint_max_iter,
            patience=patience,
            precision=precision,
            backend=backend,
            on_failure=on_failure,
        )
        self._watch(keep_solutions, on_solution)

    def forward(self, x: Any = NOT_GIVEN, /, *context: Any, z0: Any = None, **keywords: Any) -> Any:
        """The equilibrium for x; further arguments, and those by keyword, go to the cell after x.

        A sample of a tensor x that is not finite ends NONFINITE: it returns zeros, gets and
        gives a zero gradient, and the other samples are solved as if it were absent. That is for x
        with the batch dimensions of the state; with ``batch_dim=None`` all of x is one sample.

        Args:
            x: what the cell takes; for an :class:`AffineCell` ``(..., in_features)``, each vector
                a sample. By keyword it is x, or has the name of the cell's parameter after the
                state.
            context: further arguments of a general cell, of any kind; their tensors get gradients.
            keywords: the same by name. A parameter of the cell called z0 is not for them.
            z0: start of the solve, shaped like the state, in its dtype and on its device; default
                ``cell.initial_state(x)`` where that exists, else zeros: ``(..., features)`` or,
                for a general cell, shaped like x.
        """
        if z0 is not None:
            check_start(self.options.solver)
        name = None
        if x is NOT_GIVEN:
            x, keywords, name = input_of(self.cell, keywords)
        if not context and not keywords and self.options.registered:
            cell = self.cell
            if isinstance(cell, AffineCell) and cell.is_plain():
                return self._solve_affine(cell, x, z0)
        refuse_keywords(self.cell, keywords)
        return self._solve_general(x, context, keywords, z0, name)

    @outside_graphs
    def _solve_general(
        self,
        x: Any,
        context: tuple[Any, ...],
        keywords: dict[str, Any],
        z0: Any,
        name: str | None,
        along: Along | None = None,
    ) -> Any:
        finite = None
        cell, batch_dim = self.cell, self.options.batch_dim
        refuse_sharded((cell,))
        leading = leading_of(cell, x) if isinstance(cell, AffineCell) else None
        record: Any = self._record
        if leading is not None:
            x, z0, record = leading.rows(x), leading.start(z0), LeadingRecord(record, leading)
        start = start_for(cell, x) if z0 is None else z0
        dims = samples_of(x, start, batch_dim)
        if dims is not None:
            x, finite = finite_samples(x, dims)
        elif z0 is not None and isinstance(x, Tensor) and batch_dim == 0:
            explain_start(cell, z0, x, batch_dim)
        specs, report = self._specs_for(self._structure()), record.receive_adjoint
        record.forward = None  # the one before need not take memory meanwhile
        f = CellMap.of_call(cell, start, self.options, (x, *context), keywords, name)
        try:
            z, solution = solve_map(
                f,
                start,
                specs,
                report,
                self._checked,
                self._original_cell[0] if self._original_cell else cell,
                along,
            )
        except EXPLAINED as error:
            if isinstance(error, TypeError):
                explain_call(cell, context, keywords, error)
            if type(error) in EXPLAINED:
                explain_start(cell, z0, x, batch_dim, error)
            raise
        if finite is not None and dims is not None:
            z, solution = mark_nonfinite(z, solution, ~finite, dims)
            if along is not None:
                along.states = [zeroed(state, ~finite, dims) for state in along.states]
        why = why_general(cell, (*context, *keywords), self.options.registered, specs)
        if why:
            solution = dataclasses.replace(solution, path=f"{solution.path} ({why})")
        record.forward = solution
        record.judge_forward()
        aux = f.auxiliary(z) if f.has_aux else None
        if leading is not None:
            z = leading.state(z)
            if along is not None:
                along.states = [leading.state(state) for state in along.states]
        return (z, aux) if f.has_aux else z

    if TYPE_CHECKING:  # a module's call is of type Any: the state is of the kind of its start

        @overload
        def __call__(self, x: Any = ..., /, *args: Any, z0: None = None, **more: Any) -> Any: ...
        @overload
        def __call__(self, x: Any = ..., /, *args: Any, z0: State, **more: Any) -> State: ...
        def __call__(self, x: Any = ..., /, *args: Any, z0: Any = None, **more: Any) -> Any: ...

    def _solve_affine(
        self, cell: AffineCell, x: Any, z0: Any, leading: Leading | None = None
    ) -> Tensor:
        record: Any = self._record if leading is None else LeadingRecord(self._record, leading)
        if self.options.batch_dim not in (0, -2):
            refuse_batch_dim(self.options.batch_dim)
        specs = self._specs_for(cell.structure())
        weight = cell.recurrent_weight()
        linear = None if torch.compiler.is_compiling() else linear_parameters(cell.injection)
        if linear is not None and type(cell) is AffineCell:
            plan = plan_for(specs, weight, cell.activation)
            if plan is not None:
                z: Tensor | None = plan.solve(record, weight, x, *linear, z0)
                if z is not None:
                    return z
        if (vectors := leading_of(cell, x)) is not None:
            rows = self._solve_affine(cell, vectors.rows(x), vectors.start(z0), vectors)
            return vectors.state(rows)
        x, finite = finite_samples(cell.checked_input(x))
        injection = cell.injection_of(x)  # x is checked, and nothing is overridden
        start = None if z0 is None else cell.check_state(z0, injection).detach()
        z, record.forward = solve_affine(
            weight, injection, start, cell.activation, specs, record.receive_adjoint, finite
        )
        record.judge_forward()
        return z

    def extra_repr(self) -> str:
        return self.options.shown()
