"""How a state that was found is differentiated: by steps from it, or implicitly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...constants import RESIDUAL_EPS
from ...errors import CoupledSamplesError
from ...options import Options
from ...solution import Solution
from ...solve import autograd
from ...solve.checked_maps import with_the_code_of
from ...solve.eager import Eagerly
from ...solve.packing import ArgumentWrittenError, Packing
from ...solve.spec import SolveSpec, Specs
from ...solvers import Structure
from .solver import SolverStat, adjoint_solver
from .utils.layer_utils import StateMap

Writer = Callable[[SolverStat], Any]


def make_pair(target: Sequence[Any], source: Sequence[Any]) -> Sequence[Any]:
    """``source``, or its only entry as often as there are entries in ``target``.

    Raises:
        ValueError: neither one entry nor as many.
    """
    if len(source) == len(target):
        return source
    if len(source) != 1:
        raise ValueError(
            f"{len(source)} numbers of steps (grad={list(source)}) for {len(target)} states; give "
            "one, or one for each."
        )
    return list(source) * len(target)


def backward_factory(
    grad_type: Any = "ift",
    hook_ift: bool = False,
    b_solver: Callable[..., Any] | None = None,
    b_solver_kwargs: dict[str, Any] | None = None,
    sup_gap: int = -1,
    sup_loc: Sequence[int] | None = None,
    tau: float = 1.0,
    **grad_factory_kwargs: Any,
) -> Any:
    """A function of a DEQ (or None), a map, a state and a writer (or None) that returns a list of
    states which can be differentiated, the last of them the equilibrium.

    Args:
        grad_type: "ift", the implicit gradient; or how many steps from the state it
            differentiates.
        hook_ift: not needed: the implicit gradient keeps one evaluation of the map.
        b_solver, b_solver_kwargs: of the implicit gradient: a solver, and its ``max_iter``, ``tol``
            and ``stop_mode``.
        sup_gap, sup_loc: return each so-many-th of the steps too, or those of these numbers.
        tau: damping of the steps.
    """
    if grad_type == "ift":
        return ImplicitGradient(b_solver, dict(b_solver_kwargs or {}))
    steps = isinstance(grad_type, int) and not isinstance(grad_type, bool)
    if not steps or grad_type < 1:
        raise ValueError(f"grad must be a number of steps, 1 or more, got {grad_type!r}.")
    return PhantomGradient(grad_type, float(tau), sup_gap or -1, tuple(sup_loc or ()))


@dataclass
class PhantomGradient:
    """``steps`` damped steps from a state, which are differentiated, as in ``fastdeq.Phantom``."""

    steps: int
    tau: float
    sup_gap: int
    sup_loc: tuple[int, ...]

    def __call__(
        self, trainer: Any, func: Any, z_pred: Tensor, writer: Writer | None = None, **_: Any
    ) -> list[Tensor]:
        z, states = z_pred, []
        for step in range(1, self.steps + 1):
            z = func(z, tau=self.tau)
            if self.sup_gap > 0:
                if step % self.sup_gap == 0:
                    states.append(z)
            elif step in self.sup_loc:
                states.append(z)
        if self.sup_gap <= 0 or not states:
            states.append(z)
        return states


@dataclass
class ImplicitGradient:
    """The implicit gradient of the state, by ``solve.autograd``; by a function for a solver that
    was registered. Batches whose samples depend on each other are solved as one."""

    b_solver: Callable[..., Any] | None
    limits: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self, trainer: Any, func: Any, z_pred: Tensor, writer: Writer | None = None, **_: Any
    ) -> list[Tensor]:
        z = z_pred.detach()
        if not torch.is_grad_enabled():
            return [z]
        count = max(int(self.limits.get("max_iter", 40)), 1)
        solver = "auto" if self.b_solver is None else adjoint_solver(self.b_solver, count)
        if solver is None:
            value = func(z)
            return [_ByFunction.apply(value, func, self.b_solver, self.limits, writer)]
        mode, tol = self.limits.get("stop_mode", "abs"), self.limits.get("tol", 1e-6)
        spec = _adjoint_spec(solver, count, float(tol), mode)
        whole = func if isinstance(func, StateMap) else StateMap(func, z)
        try:
            return [_attached(spec, trainer, whole, z, writer, False)]
        except ArgumentWrittenError:
            return [_attached(spec, trainer, whole, z, writer, True)]


@functools.lru_cache(maxsize=64)
def _adjoint_spec(solver: Any, max_iter: int, tol: float, mode: str) -> SolveSpec:
    relative, absolute = (max(tol, 0.0), 0.0) if mode == "rel" else (0.0, max(tol, 0.0))
    options = Options(
        adjoint=solver, adjoint_tol=relative, adjoint_atol=absolute, adjoint_max_iter=max_iter
    )
    return Specs(options, Structure()).adjoint


def _attached(
    spec: SolveSpec, trainer: Any, func: StateMap, z: Tensor, writer: Writer | None, copies: bool
) -> Tensor:
    state = func.state_of(z)
    packing = Packing(state, None if are_coupled(trainer, func, z) else 0)
    packing.copies = copies
    rows = packing.pack(state)

    def report(solution: Solution | None) -> None:
        if writer is not None and solution is not None:
            writer(_stat_of(solution))

    around = autograd.autocast_of_now(rows.device.type)
    found = autograd.attach(spec, report, around(packing.rowwise(func.of_state)), rows)
    attached: Tensor = func.list2vec(packing.unpack(found))
    return attached


def are_coupled(trainer: Any, func: StateMap, z: Tensor) -> bool:
    """Whether samples of the batch z depend on each other, looked at once for each map of a DEQ;
    where they do, it takes none of its batches apart from then on."""
    if getattr(trainer, "coupled", False):
        return True
    state = func.state_of(z)
    packing = Packing(state)
    rows = packing.pack(state)
    checked = getattr(trainer, "checked_maps", None) or with_the_code_of(func.func)
    check = checked.check_of(func.func, 0, packing.ndims, rows)
    if check is None:
        return False
    packing.copies = True
    try:
        with Eagerly():
            check(packing.rowwise(func.of_state))
    except CoupledSamplesError:
        if hasattr(trainer, "coupled"):
            trainer.coupled = True
        return True
    return False


def _stat_of(solution: Solution) -> SolverStat:
    size = torch.linalg.vector_norm(solution.value, dim=1)
    relative = solution.residual
    return SolverStat.from_residuals(
        relative * (size + RESIDUAL_EPS), relative, solution.iterations.to(torch.float32)
    )


class _ByFunction(Function):
    """A value ``f(z)`` whose gradient g becomes ``u = g + J^T u``, J that of f at the value, by a
    solver that is a function."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, func: Any, solver: Any, limits: dict[str, Any], writer: Any
    ) -> Tensor:
        ctx.func, ctx.solver, ctx.limits, ctx.writer = func, solver, limits, writer
        ctx.save_for_backward(value)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (value,) = ctx.saved_tensors
        at = value.detach().requires_grad_()
        with torch.enable_grad():
            again = ctx.func(at)

        def adjoint(u: Tensor, tau: float = 1.0) -> Tensor:
            (product,) = torch.autograd.grad(again, at, u, retain_graph=True)
            following: Tensor = grad + product
            return following if tau == 1.0 else u + tau * (following - u)

        with torch.no_grad():
            found, _, stat = ctx.solver(adjoint, torch.zeros_like(grad), **ctx.limits)
        if ctx.writer is not None:
            ctx.writer(stat)
        return found, None, None, None, None
