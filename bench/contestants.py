"""The contestants: one class each, built from a problem and the settings of its two solves.

    infer()        z, without a graph
    attached(z0)   z with a graph; z0 replaces the start of zeros
    leaves         (W, x, U, b), what gradients are taken of
    iterations     of the latest forward and adjoint solve, worst sample; None before it

Everybody gets (W, U, b, x) and computes ``c = U x + b`` once. A setting is a tolerance, or a number
of iterations for a solver that has no stop test.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from problems import SCALE, TOL, Problem
from torch import Tensor

from fastdeq import AffineCell, DEQLayer

# Solvers that return f(z) after a test at z pass with more than TOL: let them.
TOLERANCES = tuple(
    TOL * factor for factor in (4, 2.8, 2, 1.4, 1, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.06, 0.03)
)

MAX_ITER = 40  # torchdeq's default, and enough


class Contestant:
    def __init__(self, problem: Problem):
        self.problem = problem
        parts = (problem.weight, problem.x, problem.input_weight, problem.bias)
        self.leaves = tuple(part.clone().requires_grad_() for part in parts)
        self.start = torch.zeros(problem.batch, problem.d)

    @property
    def iterations(self) -> tuple[int | None, int | None]:
        raise NotImplementedError

    def infer(self) -> Tensor:
        raise NotImplementedError

    def attached(self, z0: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def gradients(self, z: Tensor) -> tuple[Tensor, ...]:
        """Of ``<g, z>`` in ``leaves``. Keeps the graph, so that it can be timed again."""
        return torch.autograd.grad(z, self.leaves, self.problem.grad, retain_graph=True)


class FastDEQ(Contestant):
    def __init__(self, problem: Problem, f_setting: float, b_setting: float, **options: Any):
        super().__init__(problem)
        d = problem.d
        cell = AffineCell(d, d, activation="tanh", weight="dense", scale=SCALE)
        state = {
            "weight.weight": problem.weight,
            "injection.weight": problem.input_weight,
            "injection.bias": problem.bias,
        }
        cell.load_state_dict(state)
        weight, input_weight, bias = (cell.get_parameter(name) for name in state)
        self.leaves = (weight, self.leaves[1], input_weight, bias)
        self.layer = DEQLayer(
            cell, tol=f_setting, adjoint_tol=b_setting, on_failure="raise", **options
        )

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.layer(self.problem.x)

    def attached(self, z0: Tensor | None = None) -> Tensor:
        return self.layer(self.leaves[1], z0=z0)

    @property
    def iterations(self) -> tuple[int | None, int | None]:
        forward, adjoint = (
            None if solution is None else int(solution.iterations.max())
            for solution in (self.layer.last_solution, self.layer.last_adjoint_solution)
        )
        return forward, adjoint


class TorchDEQ(Contestant):
    """torchdeq with the implicit gradient (its own default is one step) and relative tolerances.

    Inference runs in its eval mode, which spares one evaluation of f.
    """

    def __init__(
        self,
        problem: Problem,
        f_setting: float,
        b_setting: float,
        solver: str,
        max_iter: int = MAX_ITER,
    ):
        import torchdeq

        super().__init__(problem)
        _register_tuned_anderson()
        # simple_fixed_point_iter cannot serve as a backward solver: it calls f(z, tau=...).
        simple = solver == "simple_fixed_point_iter"
        options = {
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
        self.training = torchdeq.get_deq(**options).train()
        self.evaluating = torchdeq.get_deq(**options).eval()
        self._forward_info: dict[str, Tensor] | None = None
        self._adjoint_info: dict[str, Tensor] | None = None

    def _map(self) -> Callable[[Tensor], Tensor]:
        weight, x, input_weight, bias = self.leaves
        c, transposed = F.linear(x, input_weight, bias), weight.t()
        return lambda z: torch.tanh(torch.addmm(c, z, transposed))

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
    def iterations(self) -> tuple[int | None, int | None]:
        forward, adjoint = (
            None if info is None else int(info["nstep"].max())
            for info in (self._forward_info, self._adjoint_info)
        )
        return forward, adjoint


class TorchDEQSimple(TorchDEQ):
    """Its iteration without a stop test: told the number of iterations, which no user knows."""

    def __init__(self, problem: Problem, f_setting: float, b_setting: float):
        super().__init__(problem, f_setting, b_setting, "simple_fixed_point_iter")


def _register_tuned_anderson() -> None:
    """torchdeq's Anderson with the options that serve it best here.

    Its ridge is absolute: the default 1e-4 is above the residual's square at the end of a solve,
    which then takes up to 1.7 times as many iterations. A history of 3 instead of 6 takes at most
    two more, and each is cheaper.
    """
    from torchdeq.solver import get_solver, register_solver

    register_solver("anderson_tuned", partial(get_solver("anderson"), m=3, lam=1e-8))


class Eager(Contestant):
    """What one writes without a library: two loops and an ``autograd.Function``."""

    def __init__(self, problem: Problem, f_setting: float, b_setting: float):
        super().__init__(problem)
        self.tolerances = f_setting, b_setting
        self.steps: list[int | None] = [None, None]

    @property
    def iterations(self) -> tuple[int | None, int | None]:
        return self.steps[0], self.steps[1]

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.attached()

    def attached(self, z0: Tensor | None = None) -> Tensor:
        weight, x, input_weight, bias = self.leaves
        start = self.start if z0 is None else z0
        return _EagerSolve.apply(self, weight, F.linear(x, input_weight, bias), start)


class _EagerSolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: Eager, weight: Tensor, c: Tensor, start: Tensor) -> Tensor:
        transposed = weight.t()
        z, owner.steps[0] = _iterate(
            lambda z: torch.tanh(torch.addmm(c, z, transposed)), start, owner.tolerances[0]
        )
        ctx.owner = owner
        ctx.save_for_backward(weight, z)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, z = ctx.saved_tensors
        slope = 1 - z * z
        q, ctx.owner.steps[1] = _iterate(
            lambda q: slope * torch.addmm(grad, q, weight), slope * grad, ctx.owner.tolerances[1]
        )
        return None, q.t() @ z, q, None


def _iterate(f: Callable[[Tensor], Tensor], z: Tensor, tol: float) -> tuple[Tensor, int]:
    steps = 0
    while steps < 100:
        value = f(z)
        residual = torch.linalg.vector_norm(value - z, dim=1)
        z = value
        steps += 1
        if bool((residual <= tol * torch.linalg.vector_norm(value, dim=1)).all()):
            break
    return z, steps


class Products(Contestant):
    """Not a solver: the bare products with U and W that fastdeq's plain iteration needs."""

    def __init__(self, problem: Problem, f_setting: float, b_setting: float):
        super().__init__(problem)
        picard = FastDEQ(problem, f_setting, b_setting, solver="picard")
        picard.infer()
        self.updates = picard.iterations[0] or 0
        self.out = torch.empty_like(self.start)

    @property
    def iterations(self) -> tuple[int | None, int | None]:
        return self.updates, None

    def infer(self) -> Tensor:
        problem = self.problem
        torch.mm(problem.x, problem.input_weight.t(), out=self.out)
        transposed = problem.weight.t()
        for _ in range(self.updates + 1):  # the last update is verified by one more evaluation
            torch.mm(problem.x, transposed, out=self.out)
        return self.out


@dataclass(frozen=True)
class Entry:
    """A row in the benchmark: how a contestant is built, and what is asked of it.

    ``forward_settings`` run from the loosest to the tightest; without any, nothing is verified.
    """

    name: str
    build: Callable[[Problem, float, float], Contestant]  # problem, forward and adjoint setting
    forward_settings: Sequence[float] = TOLERANCES
    modes: tuple[str, ...] = ("forward", "backward", "full")
    needs: str = ""  # a package

    @property
    def missing(self) -> str:
        """Why it cannot take part; empty when it can."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed (`pip install 'fastdeq[bench]'`)"
        return ""


def _torchdeq(name: str, solver: str, **options: Any) -> Entry:
    build = partial(TorchDEQ, solver=solver, **options)
    return Entry(f"torchdeq-{name}", build, needs="torchdeq")


ENTRIES = (
    Entry("fastdeq-auto", FastDEQ),
    Entry("fastdeq-picard", partial(FastDEQ, solver="picard", adjoint="neumann")),
    _torchdeq("fixed-point", "fixed_point_iter"),
    Entry("torchdeq-simple", TorchDEQSimple, range(1, MAX_ITER + 1), needs="torchdeq"),
    _torchdeq("anderson", "anderson_tuned"),
    # It allocates and clears max_iter states, and needs fewer than the others.
    _torchdeq("broyden", "broyden", max_iter=25),
    Entry("eager-loop", Eager),
    Entry("bare-products", Products, (), modes=("forward",)),
)
