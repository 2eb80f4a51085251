"""What one writes without a library: a loop in eager torch, compiled or not; and bare products."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from contestants import Contestant, Counts, FastDEQ
from equilibrium import PHI
from problems import Problem
from torch import Tensor

from fastdeq import ConvergenceError

Step = Callable[..., tuple[Tensor, Tensor]]


def _forward_step(
    z: Tensor, c: Tensor, transposed: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    value = PHI[activation](torch.addmm(c, z, transposed))
    return value, _residual(value, z)


def _adjoint_step(q: Tensor, grad: Tensor, slope: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    value = slope * torch.addmm(grad, q, weight)
    return value, _residual(value, q)


def _residual(value: Tensor, z: Tensor) -> Tensor:
    return (
        torch.linalg.vector_norm(value - z, dim=1) / torch.linalg.vector_norm(value, dim=1)
    ).amax()


@cache
def compiled_steps() -> tuple[Step, Step]:
    """The two steps, compiled for each shape they meet.

    Raises:
        RuntimeError: there is no C++ compiler for inductor.
    """
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise RuntimeError("inductor needs a C++ compiler")
    # Each size is compiled for itself, the way a user with one size has it.
    torch._dynamo.config.recompile_limit = 256
    steps = (_forward_step, _adjoint_step)
    forward, adjoint = (torch.compile(step, dynamic=False, fullgraph=True) for step in steps)
    return forward, adjoint


class Eager(Contestant):
    """Two loops with a stop test each, and an ``autograd.Function``."""

    def __init__(
        self, problem: Problem, f_setting: float, b_setting: float, *, compiled: bool = False
    ):
        super().__init__(problem)
        self.tolerances = f_setting, b_setting
        self.steps = compiled_steps() if compiled else (_forward_step, _adjoint_step)
        self.taken: list[int | None] = [None, None]

    @property
    def iterations(self) -> Counts:
        return self.taken[0], self.taken[1]

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.attached()

    def attached(self, z0: Tensor | None = None) -> Tensor:
        weight, x, input_weight, bias = self.leaves
        start = self.start if z0 is None else z0
        return _EagerSolve.apply(self, weight, F.linear(x, input_weight, bias), start)

    def iterate(self, direction: int, start: Tensor, *inputs: Any) -> Tensor:
        step, tol, z = self.steps[direction], self.tolerances[direction], start
        for k in range(self.spec.max_iter):
            z, residual = step(z, *inputs)
            self.taken[direction] = k + 1
            if residual.item() <= tol:
                break
        return z


class _EagerSolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: Eager, weight: Tensor, c: Tensor, start: Tensor) -> Tensor:
        z = owner.iterate(0, start, c, weight.t(), owner.spec.activation)
        ctx.owner = owner
        ctx.save_for_backward(weight, z)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, z = ctx.saved_tensors
        slope = 1 - z * z if ctx.owner.spec.activation == "tanh" else (z > 0).to(z.dtype)
        q = ctx.owner.iterate(1, slope * grad, grad, slope, weight)
        return None, q.t() @ z, q, None


class Products(Contestant):
    """Not a solver: the bare products that fastdeq's plain iteration needs, or its auto where that
    does not converge. The gradient's are those with W, U and, at its end, of q with z and x."""

    def __init__(self, problem: Problem, f_setting: float, b_setting: float):
        super().__init__(problem)
        try:
            self._counts = self._of(FastDEQ(problem, f_setting, b_setting, **PLAIN))
        except ConvergenceError:
            self._counts = self._of(FastDEQ(problem, f_setting, b_setting))
        self.out = torch.empty_like(self.start)
        self.square = torch.empty_like(problem.weight)

    @staticmethod
    def _of(solver: FastDEQ) -> Counts:
        solver.full()
        return (
            solver.iterations
        )  # of the worst sample: a loop around products takes the whole batch

    @property
    def iterations(self) -> Counts:
        return self._counts

    def infer(self) -> Tensor:
        problem = self.problem
        torch.mm(problem.x, problem.input_weight.t(), out=self.out)
        transposed = problem.weight.t()
        for _ in range(int(self._counts[0] or 0)):
            torch.mm(problem.x, transposed, out=self.out)
        return self.out

    def attached(self, z0: Tensor | None = None) -> Tensor:
        return self.infer()

    def gradients(self, state: Any) -> tuple[Tensor, ...]:
        problem = self.problem
        for _ in range(int(self._counts[1] or 0)):
            torch.mm(problem.grad, problem.weight, out=self.out)
        torch.mm(problem.grad, problem.input_weight, out=self.out)
        torch.mm(problem.grad.t(), problem.x, out=self.square)
        torch.mm(problem.grad.t(), problem.x, out=self.square)
        return self.out, self.square


PLAIN = {"solver": "picard", "adjoint": "neumann"}
