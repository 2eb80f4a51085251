"""The contestants that run in torch: fastdeq and torchdeq.

    infer()           a state, without a graph
    attached(z0)      a state with a graph; z0 replaces the start of zeros
    gradients(s)      of <g, z> in (W, x, U, b), from a state with a graph
    full(z0)          both
    tensor(s)         z of a state, as a torch tensor
    iterations        of the latest forward and adjoint solve, worst sample; None where unknown
    count_products()  products W z and q W in ``full()``, per sample: the mean over the batch where
                      samples stop one by one, else the number for the batch; not what only the
                      slopes at the solution or the gradients at the end are made of

Everybody gets (W, U, b, x) and computes ``c = U x + b`` once. A setting is a tolerance, or a number
of iterations for a solver that has no stop test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from equilibrium import PHI
from problems import Problem
from torch import Tensor, nn

from fastdeq import AffineCell, DEQLayer

Counts = tuple[float | None, float | None]


class Contestant:
    #: Whether infer() and attached() do the same work, so that one setting does for both.
    same_forward = True

    def __init__(self, problem: Problem):
        self.problem, self.spec = problem, problem.spec
        parts = (problem.weight, problem.x, problem.input_weight, problem.bias)
        self.leaves = tuple(part.clone().requires_grad_() for part in parts)
        self.start = torch.zeros(problem.batch, problem.d)

    @property
    def iterations(self) -> Counts:
        raise NotImplementedError

    def count_products(self) -> Counts:
        self.full()
        return self.iterations

    def infer(self) -> Any:
        raise NotImplementedError

    def attached(self, z0: Tensor | None = None) -> Any:
        raise NotImplementedError

    def gradients(self, state: Any) -> tuple[Any, ...]:
        """Keeps the graph, so that it can be timed again."""
        return torch.autograd.grad(state, self.leaves, self.problem.grad, retain_graph=True)

    def full(self, z0: Tensor | None = None) -> tuple[Any, ...]:
        return self.gradients(self.attached(z0))

    def tensor(self, state: Any) -> Tensor:
        return state.detach()


class Tagged(nn.Module):
    """A weight that is what it is said to be, without a map from free parameters to it."""

    def __init__(self, weight: Tensor, family: str, scale: float):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.tags = frozenset() if family == "dense" else frozenset({family})
        self.norm = scale if family == "orthogonal" else None

    def norm_bound(self) -> float | None:
        return self.norm

    def forward(self) -> Tensor:
        return self.weight


class FastDEQ(Contestant):
    def __init__(self, problem: Problem, f_setting: float, b_setting: float, **options: Any):
        super().__init__(problem)
        d, spec = problem.d, problem.spec
        own = Tagged(problem.weight, spec.weight, spec.scale)
        cell = AffineCell(d, d, activation=spec.activation, weight=own)
        state = {
            "weight.weight": problem.weight,
            "injection.weight": problem.input_weight,
            "injection.bias": problem.bias,
        }
        cell.load_state_dict(state)
        weight, input_weight, bias = (cell.get_parameter(name) for name in state)
        self.leaves = (weight, self.leaves[1], input_weight, bias)
        self.layer = DEQLayer(
            cell,
            tol=f_setting,
            adjoint_tol=b_setting,
            max_iter=max(100, spec.max_iter),
            on_failure="raise",
            **options,
        )

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.layer(self.problem.x)

    def attached(self, z0: Tensor | None = None) -> Tensor:
        return self.layer(self.leaves[1], z0=z0)

    @property
    def iterations(self) -> Counts:
        forward, adjoint = (
            None if solution is None else int(solution.iterations.max())
            for solution in (self.layer.last_solution, self.layer.last_adjoint_solution)
        )
        return forward, adjoint

    def count_products(self) -> Counts:
        """One more evaluation verifies the last update; the first, W 0, needs no product."""
        self.full()
        solutions = self.layer.last_solution, self.layer.last_adjoint_solution
        forward, adjoint = (float(s.iterations.float().mean()) for s in solutions)
        return forward, adjoint


class TorchDEQ(Contestant):
    """torchdeq with the implicit gradient (its own default is one step) and relative tolerances.

    Inference runs in its eval mode, which spares one evaluation of f.
    """

    same_forward = False

    def __init__(
        self,
        problem: Problem,
        f_setting: float,
        b_setting: float,
        solver: str,
        max_iter: int = 0,
        window: int = 0,
    ):
        import torchdeq

        super().__init__(problem)
        max_iter = max_iter or problem.spec.max_iter
        options = torchdeq_options(solver, f_setting, b_setting, max_iter, window)
        self.training = torchdeq.get_deq(**options).train()
        self.evaluating = torchdeq.get_deq(**options).eval()
        self._forward_info: dict[str, Tensor] | None = None
        self._adjoint_info: dict[str, Tensor] | None = None
        self._counted: list[int] | None = None  # products, while they are counted

    def _map(self) -> Callable[[Tensor], Tensor]:
        weight, x, input_weight, bias = self.leaves
        c, transposed = F.linear(x, input_weight, bias), weight.t()
        phi = PHI[self.spec.activation]

        def plain(z: Tensor) -> Tensor:
            return phi(torch.addmm(c, z, transposed))

        return plain if self._counted is None else _counting(plain, self._counted)

    def infer(self) -> Tensor:
        with torch.no_grad():
            z, info = self.evaluating(self._map(), self.start)
        self._forward_info = info
        return z[-1]

    def attached(self, z0: Tensor | None = None) -> Tensor:
        start = self.start if z0 is None else z0
        z, info = self.training(self._map(), start, backward_writer=self._receive)
        self._forward_info = info
        return z[-1]

    def _receive(self, info: dict[str, Tensor]) -> None:
        self._adjoint_info = info

    @property
    def iterations(self) -> Counts:
        forward, adjoint = (
            None if info is None else int(info["nstep"].max())
            for info in (self._forward_info, self._adjoint_info)
        )
        return forward, adjoint

    def count_products(self) -> Counts:
        self._counted = counted = [0, 0]
        self.full()
        self._counted = None
        return counted[0], counted[1]


def _counting(f: Callable[[Tensor], Tensor], counted: list[int]) -> Callable[[Tensor], Tensor]:
    def count(_: Tensor) -> None:
        counted[1] += 1

    def counting(z: Tensor) -> Tensor:
        if z.requires_grad:  # it is called so once, for the slopes of the adjoint's solve
            z = z.view_as(z)
            z.register_hook(count)
        else:
            counted[0] += 1
        return f(z)

    return counting


class TorchDEQSimple(TorchDEQ):
    """Its iteration without a stop test: told the number of iterations, which no user knows."""

    def __init__(self, problem: Problem, f_setting: float, b_setting: float):
        super().__init__(problem, f_setting, b_setting, "simple_fixed_point_iter")

    @property
    def iterations(self) -> Counts:
        return self._told(), super().iterations[1]

    def _told(self) -> int:
        return int(self.training.f_max_iter)


def torchdeq_options(
    solver: str, f_setting: float, b_setting: float, max_iter: int, window: int = 0
) -> dict[str, Any]:
    """Of ``torchdeq.get_deq``. ``window``: of Anderson, with the ridge that suits it best here."""
    if window:
        solver = _tuned_anderson(window)
    # simple_fixed_point_iter cannot be a backward solver: it calls f(z, tau=...).
    simple = solver == "simple_fixed_point_iter"
    return {
        "ift": True,
        "f_solver": solver,
        "b_solver": "fixed_point_iter" if simple else solver,
        "f_max_iter": int(f_setting) if simple else max_iter,
        "b_max_iter": max_iter,
        "f_tol": f_setting,
        "b_tol": b_setting,
        "f_stop_mode": "rel",
        "b_stop_mode": "rel",
    }


def _tuned_anderson(window: int) -> str:
    """torchdeq's Anderson with the options that suit it best here; the name it is registered by.

    Its ridge is absolute: the default 1e-4 is above the residual's square at the end of a solve,
    which then takes up to 1.7 times as many iterations on the easy problems, and 5 times on the
    hard ones. On the easy ones a window of 3 instead of 6 takes at most two more, and each is
    cheaper; on the hard ones 10 and 20 take fewer than 6.
    """
    from torchdeq.solver import get_solver, register_solver

    name = f"anderson_tuned_{window}"
    register_solver(name, partial(get_solver("anderson"), m=window, lam=1e-8))
    return name
