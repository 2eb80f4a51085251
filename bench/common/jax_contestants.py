"""jaxopt's solvers under ``jax.jit`` on the CPU, with its implicit gradient.

Inputs are device arrays before the clock starts, and every call waits for its result.

jaxopt's tolerance is absolute and judges the whole batch by one Frobenius norm. Here it is told
``|z*|_F``, which no user knows, and for the adjoint it is relative to ``|g|_F``; what counts is the
residual of the worst sample, as for everybody. Its default linear solver, conjugate gradients on
the normal equations, takes twice the time of BiCGSTAB here, so ``AndersonAcceleration`` gets
BiCGSTAB; ``FixedPointIteration`` gets itself, which is the Neumann series. Mapped over
the batch, its GMRES took over 40 times as long as BiCGSTAB.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from contestants import Contestant, Counts
from problems import Problem, Spec
from torch import Tensor

Map = Callable[[Any], Any]


class JaxOpt(Contestant):
    """``window``: of Anderson acceleration; 0: plain iteration. ``per_sample`` maps the solver over
    the batch (``vmap``): mixing weights and a stop test for each sample."""

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
        self._method = (problem.spec, window, per_sample)
        parts = (problem.weight, problem.x, problem.input_weight, problem.bias)
        self._leaves = tuple(map(_to_jax, parts))
        self._grad, self._zeros = _to_jax(problem.grad), _to_jax(self.start)
        norms = problem.solution.norm(dim=1)
        scale = norms.mean() if per_sample else norms.norm()
        self._tolerances = f_setting * float(scale), b_setting
        self._infer, self._full = _compiled(*self._method)
        # A gradient that is taken later cannot have its tolerance as an input.
        solve = _Solve(*self._method, *self._tolerances)
        self._attached = jax.jit(solve.attached)
        self._pull = jax.jit(lambda vjp, grad: vjp(grad))
        self._wait = jax.block_until_ready
        self._iterations: int | None = None

    def infer(self) -> Any:
        return self._keep(self._infer(*self._tolerances, self._zeros, *self._leaves))

    def attached(self, z0: Tensor | None = None) -> Any:
        return self._keep(self._attached(self._start(z0), *self._leaves))

    def _keep(self, state: Any) -> Any:
        self._iterations = state[-1]
        return self._wait(state)

    def _start(self, z0: Tensor | None) -> Any:
        return self._zeros if z0 is None else _to_jax(z0)

    def gradients(self, state: Any) -> tuple[Any, ...]:
        return self._wait(self._pull(state[1], self._grad))

    def full(self, z0: Tensor | None = None) -> tuple[Any, ...]:
        inputs = (*self._tolerances, self._start(z0), self._grad, *self._leaves)
        return self._wait(self._full(*inputs))

    def tensor(self, state: Any) -> Tensor:
        return torch.from_numpy(np.array(state[0]))

    @property
    def iterations(self) -> Counts:
        """jaxopt does not report the adjoint's."""
        return None if self._iterations is None else int(self._iterations), None

    def count_products(self) -> Counts:
        import jax

        self.attached()
        counter = _Solve(*self._method, *self._tolerances, counting=True)
        jax.jit(counter.full)(self._zeros, self._grad, *self._leaves)
        jax.effects_barrier()
        return self.iterations[0], counter.adjoint_products


@cache
def _compiled(spec: Spec, window: int, per_sample: bool) -> tuple[Any, Any]:
    """The state, and the gradients, for any tolerances."""
    import jax

    method = (spec, window, per_sample)

    def infer(f_tol: Any, b_tol: Any, start: Any, *leaves: Any) -> Any:
        return _Solve(*method, f_tol, b_tol)(start, *leaves)

    def full(f_tol: Any, b_tol: Any, start: Any, grad: Any, *leaves: Any) -> Any:
        return _Solve(*method, f_tol, b_tol).full(start, grad, *leaves)

    return jax.jit(infer), jax.jit(full)


class _Solve:
    """Functions of JAX arrays: start, g, and the leaves W, x, U, b."""

    def __init__(
        self,
        spec: Spec,
        window: int,
        per_sample: bool,
        f_tol: Any,
        b_tol: Any,
        *,
        counting: bool = False,
    ):
        self.spec, self.window, self.per_sample = spec, window, per_sample
        self.tolerances, self.counting = (f_tol, b_tol), counting
        self.adjoint_products = 0

    def __call__(self, start: Any, weight: Any, x: Any, input_weight: Any, bias: Any) -> Any:
        """z and the number of iterations."""
        import jax
        import jax.numpy as jnp

        phi = jnp.tanh if self.spec.activation == "tanh" else jax.nn.relu

        def f(z: Any, weight: Any, c: Any) -> Any:
            return phi(z @ weight.T + c)

        def run(start: Any, weight: Any, c: Any) -> Any:
            params, state = self._solver(f).run(start, weight, c)
            return params, state.iter_num

        c = x @ input_weight.T + bias
        if self.per_sample:
            z, count = jax.vmap(run, in_axes=(0, None, 0))(start, weight, c)
            return z, count.max()
        return run(start, weight, c)

    def attached(self, start: Any, *leaves: Any) -> Any:
        """z, its pullback, and the number of iterations."""
        import jax

        return jax.vjp(lambda *leaves: self(start, *leaves), *leaves, has_aux=True)

    def full(self, start: Any, grad: Any, *leaves: Any) -> Any:
        return self.attached(start, *leaves)[1](grad)

    def _solver(self, f: Callable[..., Any]) -> Any:
        import jaxopt

        options = {"maxiter": self.spec.max_iter, "tol": self.tolerances[0], "implicit_diff": True}
        if self.window:
            options |= {"history_size": self.window, "ridge": 1e-8}
            options["implicit_diff_solve"] = self._bicgstab
            return jaxopt.AndersonAcceleration(f, **options)
        options["implicit_diff_solve"] = self._neumann
        return jaxopt.FixedPointIteration(f, **options)

    def _bicgstab(self, matvec: Map, b: Any) -> Any:
        from jaxopt.linear_solve import solve_bicgstab

        matvec, tol = self._counted(matvec), self.tolerances[1]
        return solve_bicgstab(matvec, b, tol=tol, maxiter=self.spec.max_iter)

    def _neumann(self, matvec: Map, b: Any) -> Any:
        """``(J^T - I) u = b`` as ``u = J^T u - b``."""
        import jax.numpy as jnp
        import jaxopt

        matvec = self._counted(matvec)
        solver = jaxopt.FixedPointIteration(
            lambda u, b: matvec(u) + u - b,
            maxiter=self.spec.max_iter,
            tol=self.tolerances[1] * jnp.linalg.norm(b),
            implicit_diff=False,
            unroll=False,
        )
        return solver.run(-b, b).params

    def _counted(self, matvec: Map) -> Map:
        if not self.counting:
            return matvec
        import jax

        def counted(u: Any) -> Any:
            jax.debug.callback(self._count)
            return matvec(u)

        return counted

    def _count(self) -> None:
        self.adjoint_products += 1


def _to_jax(tensor: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(tensor.detach().numpy())
