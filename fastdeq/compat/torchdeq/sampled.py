"""DEQs that return states along a solve, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import check_options
from ...solve.eager import outside_graphs
from .base import PER_CALL, DEQBase
from .grad import Writer, backward_factory, make_pair
from .solver import SolverStat, adjoint_solver
from .solver.engine import OPTIONAL
from .utils.layer_utils import StateMap, deq_decorator

_CALL = ("solver_kwargs", "sradius_mode", "backward_writer")


def limit_of(options: dict[str, Any]) -> Any:
    """The number of evaluations that a call asks for, or None."""
    limit = options.get("f_max_iter")
    return options.get("max_iter") if limit is None else limit


class SampledDEQ(DEQBase):
    """A DEQ that returns states along a solve, each with a gradient.

    Args:
        args, kwargs: see ``DEQBase``.
        ift, hook_ift: the implicit gradient, of the last state.
        grad: how many steps from a state are differentiated; a list has one number for each state.
        tau: damping of these steps.
        sup_gap, sup_loc: each so-many-th of these steps is returned too, or those of these numbers.
        n_states: states in all, spaced evenly over ``f_max_iter`` evaluations.
        indexing: where ``n_states`` is 1: evaluations after which states are returned too.
    """

    def __init__(
        self,
        args: Any = None,
        ift: bool = False,
        hook_ift: bool = False,
        grad: int | Sequence[int] = 1,
        tau: float = 1.0,
        sup_gap: int = -1,
        sup_loc: Sequence[int] | None = None,
        n_states: int = 1,
        indexing: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(args=args, **kwargs)
        get = self.args.get
        grad = get("grad", grad)
        steps = list(grad) if isinstance(grad, (list, tuple)) else [grad]
        self.arg_n_states, self.arg_indexing = n_states, list(indexing or ())
        self.indexing = self._compute_f_iter(self.f_max_iter)
        how = {name: get(name, default) for name, default in (("tau", tau), ("sup_gap", sup_gap))}
        how["sup_loc"] = get("sup_loc", sup_loc)
        self.produce_grad = [
            backward_factory(grad_type=count, **how) for count in make_pair(self.indexing, steps)
        ]
        if get("ift", ift) or get("hook_ift", hook_ift):
            limits = {
                "max_iter": self.b_max_iter,
                "tol": self.b_tol,
                "stop_mode": self.b_stop_mode,
            }
            self.produce_grad[-1] = backward_factory(
                "ift", b_solver=self.b_solver, b_solver_kwargs=limits
            )

    def _compute_f_iter(self, f_max_iter: float) -> list[int]:
        raise NotImplementedError

    def _asked_for(self) -> tuple[int, list[int]]:
        """``n_states`` and ``indexing``."""
        get = self.args.get
        return get("n_states", self.arg_n_states), list(get("indexing", self.arg_indexing) or ())

    def _trained(
        self, deq_func: StateMap, z: Tensor, kwargs: dict[str, Any], writer: Writer | None
    ) -> tuple[list[Tensor], SolverStat]:
        """The states of a training step."""
        raise NotImplementedError

    @outside_graphs
    def forward(
        self,
        func: Callable[..., Any],
        z_init: Any,
        solver_kwargs: dict[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: Writer | None = None,
        **kwargs: Any,
    ) -> tuple[list[Any], SolverStat]:
        """Solves ``z = func(z)`` for each sample.

        Args:
            func: of a tensor, or of as many tensors as ``z_init`` has.
            z_init: start, a tensor ``(B, ...)``, or a tuple or list of them.
            solver_kwargs: for this call: f_max_iter, f_tol, f_stop_mode, and options of the solver.
            sradius_mode: estimate the spectral radius, in eval mode.
            backward_writer: called with the statistics of the solve of an implicit gradient.

        Returns:
            States, the equilibrium last, each a tensor or a list of them; and statistics. In eval
            mode there is one state. Gradients follow grad mode, in both.

        Raises:
            TypeError, ValueError: unknown options, states that do not fit.
        """
        check_options(kwargs, _CALL, f"{type(self).__name__}(func, z_init)")
        options = dict(solver_kwargs or {})
        self._check_solver_kwargs(options)
        deq_func, z = deq_decorator(func, z_init, no_stat=self.no_stat)
        if self.training:
            states, info = self._trained(deq_func, z, options, backward_writer)
            return [deq_func.vec2list(state) for state in states], info
        limit = limit_of(options)
        most = self.eval_f_max_iter if limit is None else limit
        z, _, info = self._found(deq_func, z, options, max_iter=most)
        nothing = torch.zeros(1, device=z.device)
        info["sradius"] = self._sradius(deq_func, z) if sradius_mode else nothing
        if torch.is_grad_enabled():
            attached = self.produce_grad[-1](self, deq_func, z.detach(), writer=backward_writer)[-1]
            if attached.requires_grad:  # the same numbers as without a gradient
                z = z + (attached - attached.detach())
        return [deq_func.vec2list(z)], info

    def _check_solver_kwargs(self, options: dict[str, Any]) -> None:
        if adjoint_solver(self.f_solver, 1) is not None:  # none that was registered
            known = (*PER_CALL, *OPTIONAL)
            unknown = {name: value for name, value in options.items() if name not in known}
            check_options(unknown, known, "solver_kwargs")
