"""The problems and the contestants of the other benchmarks, on a GPU.

fastdeq takes part as a user has it (``fastdeq-auto``) and once on each engine for a GPU, whether
the choice would take that engine or not. An engine that cannot solve a problem is left out with its
own reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from contestants import Contestant, FastDEQ, TorchDEQ
from entries import FACTORS
from loops import Eager
from problems import Problem, Spec
from torch import Tensor
from verify import NotReachedError

from fastdeq import ConvergenceError, Neumann, Picard
from fastdeq.backends import choose

CERTIFIED = {
    "solver": Picard(fixed_iterations="certified"),
    "adjoint": Neumann(fixed_iterations="certified"),
}
#: Multiply-adds of a product up to which answers are checked on the CPU. Beyond, the GPU's own
#: float64 arithmetic does it, a hundred times faster.
_CHECK_ON_CPU = 2**31
_REACH = 4  # as in problems.py: how many tolerances slopes may be taken away from the state

#: The engines of which each takes part by itself.
GPU_ENGINES = tuple(e for e in choose.ENGINES if e.backend in ("cuda", "triton"))

Build = Callable[[Problem, float, float], Contestant]


class DeviceProblem(Problem):
    """The float32 problem on ``device``; answers are judged in float64, on the CPU or there."""

    def __init__(self, spec: Spec, device: torch.device):
        super().__init__(spec)
        small = spec.d**2 * spec.batch <= _CHECK_ON_CPU
        self.judge = torch.device("cpu") if small else device
        for name in ("weight", "input_weight", "bias", "x", "grad"):
            setattr(self, name, getattr(self, name).to(device))
        for name in ("_w", "_u", "_c", "_g"):
            setattr(self, name, getattr(self, name).to(self.judge))

    def state_residual(self, z: Tensor) -> float:
        return super().state_residual(z.detach().to(self.judge))

    def adjoint_residual(self, grad_x: Tensor, z: Tensor | None = None) -> float:
        at = None if z is None else z.detach().to(self.judge)
        return super().adjoint_residual(grad_x.to(self.judge), at)

    def weight_error(self, z: Tensor, grad_weight: Tensor, grad_x: Tensor) -> tuple[float, float]:
        """As in Problem, but for a bound on |q| instead of singular values, which take seconds.

        ``|q|^8 <= |G^2|_F^2`` with ``G = q^T q``: at most ``d^(1/8)`` times too large.
        """
        q = grad_x.to(self.judge).double() @ self._u.t()
        z = z.detach().to(self.judge).double()
        product = q.t() @ z
        length = product.norm()
        gram = q.t() @ q
        norm = (gram @ gram).norm() ** 0.25
        away = _REACH * self.spec.tol * norm * z.norm() / length
        error = (grad_weight.to(self.judge).double() - product).norm() / length
        return float(error.nan_to_num(nan=torch.inf)), self.allowed + float(away)


@contextlib.contextmanager
def _only(engine: choose.Engine) -> Iterator[None]:
    before = choose.ENGINES
    choose.ENGINES = (engine,)
    try:
        yield
    finally:
        choose.ENGINES = before


class OnEngine(FastDEQ):
    """fastdeq with no engine to choose but one."""

    def __init__(self, problem: Problem, f_setting: float, b_setting: float, engine: choose.Engine):
        super().__init__(problem, f_setting, b_setting, backend=engine.backend)
        self.engine = engine

    def infer(self) -> Tensor:
        with _only(self.engine):
            return super().infer()

    def attached(self, z0: Tensor | None = None) -> Tensor:
        with _only(self.engine):
            return super().attached(z0)

    def gradients(self, state: Any) -> tuple[Any, ...]:
        with _only(self.engine):
            return super().gradients(state)

    def full(self, z0: Tensor | None = None) -> tuple[Any, ...]:
        with _only(self.engine):
            return super().gradients(super().attached(z0))


class Replayed(FastDEQ):
    """A certified solve and its gradients, recorded once in a CUDA graph and replayed."""

    def __init__(self, problem: Problem, f_setting: float, b_setting: float):
        super().__init__(problem, f_setting, b_setting, **CERTIFIED)
        if not torch.cuda.is_available():
            raise NotReachedError("CUDA graphs need a CUDA device")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                super().gradients(super().attached())
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.z = super().attached()
            self.grads = super().gradients(self.z)

    def attached(self, z0: Tensor | None = None) -> Tensor:
        self.graph.replay()
        return self.z

    def infer(self) -> Tensor:
        return self.attached()

    def gradients(self, state: Any) -> tuple[Any, ...]:
        return self.grads


@dataclass(frozen=True)
class Contender:
    """Who takes part: ``settings`` are tried from loose to tight, in units of the tolerance;
    ``weights`` are the structures where it does."""

    name: str
    build: Build
    needs: str = ""  # a package
    settings: tuple[float, ...] = FACTORS
    weights: tuple[str, ...] = ("dense", "symmetric", "orthogonal")
    patience: float = 45.0  # seconds, compilation included, after which it is taken to hang
    least: float = 8.0  # seconds without which it is not worth a beginning

    @property
    def missing(self) -> str:
        """Why it cannot take part; empty when it can."""
        absent = self.needs and importlib.util.find_spec(self.needs) is None
        return f"{self.needs} is not installed" if absent else ""


_COMPILED = Contender(
    "eager-compiled",
    partial(Eager, compiled=True),
    weights=("dense",),  # the other structures take the same steps
    patience=120.0,
    least=40.0,
)


def contenders(compiled: bool) -> tuple[Contender, ...]:
    """Everybody; ``compiled`` lets the loop that torch.compile compiles take part."""
    engine_names = [(f"fastdeq-{e.backend}-{e.name}", e) for e in GPU_ENGINES]
    certified = {"settings": (1.0,), "weights": ("orthogonal",)}  # the count is the tolerance's
    return (
        Contender("fastdeq-auto", FastDEQ),
        *(Contender(name, partial(OnEngine, engine=e)) for name, e in engine_names),
        Contender("fastdeq-float32", partial(FastDEQ, precision="float32")),
        Contender("fastdeq-reference", partial(FastDEQ, backend="reference")),
        Contender("fastdeq-certified", partial(FastDEQ, **CERTIFIED), **certified),
        Contender("fastdeq-replayed", Replayed, **certified),
        Contender("torchdeq-fixed-point", partial(TorchDEQ, solver="fixed_point_iter"), "torchdeq"),
        Contender("torchdeq-anderson", partial(TorchDEQ, solver="anderson", window=3), "torchdeq"),
        Contender("eager-loop", Eager),
        *([_COMPILED] if compiled else []),
    )


@dataclass
class Settled:
    """A contestant whose answer was verified, and what was found."""

    contestant: Contestant
    facts: dict[str, Any]


def settle(contender: Contender, problem: DeviceProblem) -> Settled:
    """The loosest settings with which the state, then the gradient, reach the tolerance in float64.

    Raises:
        NotReachedError: something is missing, or no setting does.
    """
    if contender.missing:
        raise NotReachedError(contender.missing)
    tol, best = problem.spec.tol, float("inf")

    def build(forward: float, adjoint: float) -> Contestant:
        with problem.x.device:  # what a contestant makes for itself is made there
            return contender.build(problem, forward * tol, adjoint * tol)

    try:
        for forward in contender.settings:
            contestant = build(forward, contender.settings[-1])
            best = problem.state_residual(contestant.tensor(contestant.attached()))
            if best <= problem.allowed:
                break
        else:
            raise NotReachedError(f"no setting reaches {problem.allowed:.3g}; last was {best:.3g}")
        for adjoint in contender.settings:
            contestant = build(forward, adjoint)
            found = _judged(contestant, problem)
            if found["adjoint_residual"] <= problem.allowed:
                settings = {"forward_setting": forward * tol, "adjoint_setting": adjoint * tol}
                return Settled(contestant, found | settings | _described(contestant))
    except (ConvergenceError, torch.linalg.LinAlgError) as error:
        raise NotReachedError(f"it says itself: {error}") from error
    last = found["adjoint_residual"]
    raise NotReachedError(f"no setting brings the gradient to {problem.allowed:.3g}; {last:.3g}")


def _judged(contestant: Contestant, problem: DeviceProblem) -> dict[str, Any]:
    state = contestant.attached()
    z = contestant.tensor(state)
    grad_weight, grad_x = contestant.gradients(state)[:2]
    error, bound = problem.weight_error(z, grad_weight, grad_x)
    if error > bound:
        raise NotReachedError(
            f"dL/dW is off by {error:.2g} from what dL/dx says; {bound:.2g} may be"
        )
    return {
        "residual": problem.state_residual(z),
        "adjoint_residual": problem.adjoint_residual(grad_x, z),
        "weight_gradient_error": error,
        "judge": problem.judge.type,
    }


def _described(contestant: Contestant) -> dict[str, Any]:
    """Engines of one forward and backward pass, iterations, and products per sample."""
    products, taken = contestant.count_products(), []
    if isinstance(contestant, FastDEQ):
        specs = contestant.layer._specs
        taken += [*specs.forward.engines_chosen[-1:], *specs.adjoint.engines_chosen[-1:]]
    return {"engines": taken, "iterations": contestant.iterations, "products": products}
