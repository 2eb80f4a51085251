"""Options of a DEQ, and its solvers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import check_choice, check_options
from ...solve.checked_maps import CheckedMaps
from .grad import Writer, are_coupled
from .loss import power_method
from .solver import SolverStat, get_solver, mixes_steps
from .solver.engine import STOP_MODES
from .utils.arg_utils import NAMES
from .utils.config import DEQConfig
from .utils.layer_utils import StateMap

#: What ``solver_kwargs`` may say besides the options of solvers, and its name as an argument.
PER_CALL = {
    "f_max_iter": "max_iter",
    "max_iter": "max_iter",
    "f_tol": "tol",
    "tol": "tol",
    "f_stop_mode": "stop_mode",
    "stop_mode": "stop_mode",
}


def is_own(what: Any) -> bool:
    """Whether a class or function is one of this package's, rather than one that was registered."""
    name = getattr(what, "__module__", None) or ""
    return name.partition(".")[0] == __name__.partition(".")[0]


def check_names(owner: str, options: dict[str, Any]) -> None:
    """Raises TypeError for options that nothing here knows, with those that are."""
    valid = (*NAMES, "no_stat")
    check_options({k: v for k, v in options.items() if k not in valid}, valid, owner)


class DEQBase(nn.Module):
    """Options of a DEQ, and its solvers; ``forward`` is that of a subclass.

    Args:
        args: an ``argparse.Namespace``, a mapping or a ``DEQConfig``, in which these options are
            looked for first. It may hold other names.
        f_solver, b_solver: solver of the forward pass and of the implicit gradient: see ``solver``.
        no_stat: not needed.
        f_max_iter, b_max_iter: most evaluations, most products.
        f_tol, f_stop_mode: a sample has converged where ``|f(z) - z| < f_tol``; with "rel" divided
            by ``|f(z)|``. The solve goes on until all samples have.
        b_tol, b_stop_mode: of the implicit gradient; "abs" is relative to the norm of each sample's
            incoming gradient, "rel" to that of the adjoint.
        eval_factor, eval_f_max_iter: ``f_max_iter`` in eval mode is multiplied by the first, or is
            the second where it is not 0.
        kwargs: options, which go before those in ``args``. An unknown one raises.
    """

    def __init__(
        self,
        args: Any = None,
        f_solver: str = "fixed_point_iter",
        b_solver: str = "fixed_point_iter",
        no_stat: bool | None = None,
        f_max_iter: int = 40,
        b_max_iter: int = 40,
        f_tol: float = 1e-3,
        b_tol: float = 1e-6,
        f_stop_mode: str = "abs",
        b_stop_mode: str = "abs",
        eval_factor: float = 1.0,
        eval_f_max_iter: int = 0,
        **kwargs: Any,
    ):
        super().__init__()
        if is_own(type(self)):
            check_names(type(self).__name__, kwargs)
        self.args = DEQConfig(args)
        self.args.update(**kwargs)
        get = self.args.get
        name = get("f_solver", f_solver)
        self.f_solver, self.b_solver = get_solver(name), get_solver(get("b_solver", b_solver))
        no_stat = get("no_stat", no_stat)
        self.no_stat = name == "simple_fixed_point_iter" if no_stat is None else no_stat
        self.f_max_iter = get("f_max_iter", f_max_iter)
        self.b_max_iter = get("b_max_iter", b_max_iter)
        self.f_tol, self.b_tol = get("f_tol", f_tol), get("b_tol", b_tol)
        self.f_stop_mode = get("f_stop_mode", f_stop_mode)
        self.b_stop_mode = get("b_stop_mode", b_stop_mode)
        check_choice(self.f_stop_mode, STOP_MODES, "f_stop_mode")
        check_choice(self.b_stop_mode, STOP_MODES, "b_stop_mode")
        exact, factor = get("eval_f_max_iter", eval_f_max_iter), get("eval_factor", eval_factor)
        self.eval_f_max_iter = exact if exact > 0 else int(self.f_max_iter * factor)
        self.hook = None
        #: Maps whose samples were seen to be independent, and whether some were seen not to be.
        self.checked_maps = CheckedMaps()
        self.coupled = False

    def _sradius(self, deq_func: StateMap, z_star: Tensor) -> Tensor:
        """The spectral radius of each sample, ``(B,)``."""
        at = z_star.detach().requires_grad_()
        with torch.enable_grad():
            value = deq_func(at)
        if not value.requires_grad:
            return z_star.new_zeros(len(z_star) if z_star.dim() else 1)
        return power_method(value, at)[1]

    def _found(
        self, deq_func: StateMap, z_init: Tensor, kwargs: dict[str, Any] | None, **how: Any
    ) -> tuple[Tensor, list[Tensor], SolverStat]:
        """Solves without a graph; again, and as one, where samples turn out to be coupled. What a
        call says in its ``solver_kwargs`` goes before ``how``, but for the evaluations."""
        options = {"tol": self.f_tol, "stop_mode": self.f_stop_mode}
        for name, value in (kwargs or {}).items():
            if PER_CALL.get(name, name) != "max_iter":
                options[PER_CALL.get(name, name)] = value
        deq_func.coupled = self.coupled
        with torch.no_grad():
            found = self.f_solver(deq_func, x0=z_init, **options, **how)
        if self.coupled or not torch.is_grad_enabled() or not mixes_steps(self.f_solver):
            return found  # type: ignore[no-any-return]
        if are_coupled(self, deq_func, found[0].detach()):
            return self._found(deq_func, z_init, kwargs, **how)
        return found  # type: ignore[no-any-return]

    def _solve_fixed_point(
        self,
        deq_func: StateMap,
        z_init: Tensor,
        f_max_iter: Any = None,
        solver_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        raise NotImplementedError

    def forward(
        self,
        func: Callable[..., Any],
        z_init: Any,
        solver_kwargs: dict[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: Writer | None = None,
        **kwargs: Any,
    ) -> tuple[list[Any], SolverStat]:
        raise NotImplementedError
