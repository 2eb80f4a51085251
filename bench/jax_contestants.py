"""jaxopt's solvers under ``jax.jit`` on the CPU, with its implicit gradient.

Inputs are device arrays before the clock starts, and every call waits for its result.

jaxopt's tolerance is absolute and judges the whole batch by one Frobenius norm. Here it is told
``|z*|_F``, which no user knows, and for the adjoint it is relative to ``|g|_F``; what counts is the
residual of the worst sample, as for everybody. Its default linear solver, conjugate gradients on
the normal equations, takes twice the time of BiCGSTAB here, so ``AndersonAcceleration`` gets
BiCGSTAB; ``FixedPointIteration`` gets itself, which is the Neumann series.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from contestants import Contestant, Counts
from problems import Problem
from torch import Tensor


class JaxOpt(Contestant):
    """``per_sample`` maps the solver over the batch (``vmap``): weights and stop test of each."""

    def __init__(
        self,
        problem: Problem,
        f_setting: float,
        b_setting: float,
        *,
        window: int = 0,
        per_sample: bool = False,
    ):
        import jax

        super().__init__(problem)
        self._settings, self._window, self._per_sample = (f_setting, b_setting), window, per_sample
        parts = (problem.weight, problem.x, problem.input_weight, problem.bias)
        self._leaves = tuple(map(_to_jax, parts))
        self._grad, self._zeros = _to_jax(problem.grad), _to_jax(self.start)
        norms = problem.solution.norm(dim=1)
        scale = norms.mean() if per_sample else norms.norm()
        self._absolute = f_setting * float(scale)
        self._iterations: Counts = (None, None)

        solve = self._solve
        self._infer = jax.jit(lambda start, *leaves: solve(start, *leaves)[0])
        self._count = jax.jit(lambda start, *leaves: solve(start, *leaves)[1])

        def attached(start: Any, *leaves: Any) -> Any:
            return jax.vjp(lambda *a: solve(start, *a)[0], *leaves)

        def full(start: Any, grad: Any, *leaves: Any) -> Any:
            return attached(start, *leaves)[1](grad)

        self._attached, self._full = jax.jit(attached), jax.jit(full)
        self._pull = jax.jit(lambda vjp, grad: vjp(grad))
        self._wait = jax.block_until_ready

    def _solve(self, start: Any, weight: Any, x: Any, input_weight: Any, bias: Any) -> Any:
        import jax
        import jax.numpy as jnp

        phi = jnp.tanh if self.spec.activation == "tanh" else jax.nn.relu

        def f(z: Any, weight: Any, c: Any) -> Any:
            return phi(z @ weight.T + c)

        def run(start: Any, weight: Any, c: Any) -> Any:
            params, state = self._solver(f).run(start, weight, c)
            return params, state.iter_num

        c = x @ input_weight.T + bias
        if self._per_sample:
            z, count = jax.vmap(run, in_axes=(0, None, 0))(start, weight, c)
            return z, count.max()
        return run(start, weight, c)

    def _solver(self, f: Callable[..., Any]) -> Any:
        import jaxopt

        options = {"maxiter": self.spec.max_iter, "tol": self._absolute, "implicit_diff": True}
        if self._window:
            options |= {"history_size": self._window, "ridge": 1e-8}
            options["implicit_diff_solve"] = self._bicgstab
            return jaxopt.AndersonAcceleration(f, **options)
        options["implicit_diff_solve"] = self._neumann
        return jaxopt.FixedPointIteration(f, **options)

    def _bicgstab(self, matvec: Callable[[Any], Any], b: Any) -> Any:
        from jaxopt.linear_solve import solve_bicgstab

        return solve_bicgstab(matvec, b, tol=self._settings[1], maxiter=self.spec.max_iter)

    def _neumann(self, matvec: Callable[[Any], Any], b: Any) -> Any:
        """``(J^T - I) u = b`` as ``u = J^T u - b``."""
        import jax.numpy as jnp
        import jaxopt

        solver = jaxopt.FixedPointIteration(
            lambda u, b: matvec(u) + u - b,
            maxiter=self.spec.max_iter,
            tol=self._settings[1] * jnp.linalg.norm(b),
            implicit_diff=False,
            unroll=False,
        )
        return solver.run(-b, b).params

    def infer(self) -> Any:
        return self._wait(self._infer(self._zeros, *self._leaves))

    def attached(self, z0: Tensor | None = None) -> Any:
        start = self._zeros if z0 is None else _to_jax(z0)
        return self._wait(self._attached(start, *self._leaves))

    def gradients(self, state: Any) -> tuple[Any, ...]:
        return self._wait(self._pull(state[1], self._grad))

    def full(self) -> tuple[Any, ...]:
        return self._wait(self._full(self._zeros, self._grad, *self._leaves))

    def tensor(self, state: Any) -> Tensor:
        z = state[0] if isinstance(state, tuple) else state
        return torch.from_numpy(np.array(z))

    @property
    def iterations(self) -> Counts:
        """The adjoint's are not reported by jaxopt."""
        return int(self._count(self._zeros, *self._leaves)), None


def _to_jax(tensor: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(tensor.detach().numpy())
