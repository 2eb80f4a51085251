"""The contestants around a general cell: fastdeq, torchdeq, the tutorial's loop, and bare calls.

    infer()           a state, without a graph
    attached()        a state with a graph
    gradients(s)      of <g, z> in the parameters of the cell and in x, from a state with a graph
    full()            both

The cell may be one that counts or shows the adjoint solution, in place of the problem's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from general_cells import State
from general_problem import Counted, Counts, GeneralProblem, like, mapped, rows, tensors
from torch import Tensor, nn

from fastdeq import DEQLayer


class GeneralContestant:
    def __init__(
        self,
        problem: GeneralProblem,
        f_setting: float,
        b_setting: float,
        cell: nn.Module | None = None,
    ):
        self.problem, self.settings = problem, (f_setting, b_setting)
        self.cell = problem.cell if cell is None else cell
        self.x = mapped(lambda part: part.clone().requires_grad_(), problem.x)
        self.leaves = (*self.cell.parameters(), *tensors(self.x))

    def infer(self) -> State:
        with torch.no_grad():
            return self.attached()

    def attached(self) -> State:
        raise NotImplementedError

    def gradients(self, state: State) -> tuple[Tensor, ...]:
        """Keeps the graph, so that it can be timed again."""
        given = tensors(self.problem.grad)
        return torch.autograd.grad(tensors(state), self.leaves, given, retain_graph=True)

    def full(self) -> tuple[Tensor, ...]:
        return self.gradients(self.attached())


class GeneralFastDEQ(GeneralContestant):
    def __init__(
        self,
        problem: GeneralProblem,
        f_setting: float,
        b_setting: float,
        cell: nn.Module | None = None,
        **options: Any,
    ):
        super().__init__(problem, f_setting, b_setting, cell)
        self.layer = DEQLayer(
            self.cell,
            tol=f_setting,
            adjoint_tol=b_setting,
            max_iter=problem.spec.max_iter,
            **{"on_failure": "raise", **options},
        )

    def attached(self) -> State:
        return self.layer(self.x, z0=self.problem.start)


class GeneralTorchDEQ(GeneralContestant):
    """torchdeq with the implicit gradient and relative tolerances; see ``contestants.TorchDEQ``.

    ``solver``: a name, or one that ``contestants.tuned_anderson`` has registered.
    """

    def __init__(
        self,
        problem: GeneralProblem,
        f_setting: float,
        b_setting: float,
        cell: nn.Module | None = None,
        *,
        solver: str,
        max_iter: int = 0,
        tuned_window: int = 0,
    ):
        import torchdeq
        from contestants import torchdeq_options

        super().__init__(problem, f_setting, b_setting, cell)
        max_iter = max_iter or problem.spec.max_iter
        options = torchdeq_options(solver, f_setting, b_setting, max_iter, tuned_window)
        self.training = torchdeq.get_deq(**options).train()
        # Its simple iteration keeps the parts of a tuple apart where it takes no statistics, and
        # its implicit gradient cannot take them so; get_deq does not pass this option on.
        self.training.no_stat = False
        self.evaluating = torchdeq.get_deq(**options).eval()

    def _map(self) -> Callable[..., Any]:
        cell, x = self.cell, self.x
        if isinstance(self.problem.start, tuple):
            return lambda *parts: cell(parts, x)
        return lambda z: cell(z, x)

    def infer(self) -> State:
        with torch.no_grad():
            z, _ = self.evaluating(self._map(), self.problem.start)
        return z[-1]

    def attached(self) -> State:
        z, _ = self.training(self._map(), self.problem.start)
        return z[-1]


class Tutorial(GeneralContestant):
    """Anderson acceleration as the tutorial on deep implicit layers writes it (chapter 4).

    History 5, ridge 1e-4, one stop test for the whole batch, the adjoint in a hook. The tutorial
    has one tensor; parts of a tuple are laid side by side, as its reader would do.
    """

    def attached(self) -> State:
        start, x = self.problem.start, self.x

        def f(packed: Tensor) -> Tensor:
            return rows(self.cell(like(packed, start), x))

        with torch.no_grad():
            z = tutorial_anderson(f, rows(start), self.settings[0], self.problem.spec.max_iter)
        if not torch.is_grad_enabled():
            return like(z, start)
        z = f(z)
        z0 = z.detach().requires_grad_()
        f0 = f(z0)

        def hook(grad: Tensor) -> Tensor:
            def adjoint(u: Tensor) -> Tensor:
                return torch.autograd.grad(f0, z0, u, retain_graph=True)[0] + grad

            return tutorial_anderson(adjoint, grad, self.settings[1], self.problem.spec.max_iter)

        z.register_hook(hook)
        return like(z, start)


def tutorial_anderson(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    tol: float,
    max_iter: int,
    m: int = 5,
    lam: float = 1e-4,
) -> Tensor:
    """The tutorial's function for rows ``(B, n)``, but for its list of residuals."""
    batch, size = x0.shape
    X, F = x0.new_zeros(batch, m, size), x0.new_zeros(batch, m, size)
    X[:, 0], F[:, 0] = x0, f(x0)
    X[:, 1], F[:, 1] = F[:, 0], f(F[:, 0])
    H = x0.new_zeros(batch, m + 1, m + 1)
    H[:, 0, 1:] = H[:, 1:, 0] = 1
    y = x0.new_zeros(batch, m + 1, 1)
    y[:, 0] = 1
    for k in range(2, max_iter):
        n = min(k, m)
        G = F[:, :n] - X[:, :n]
        H[:, 1 : n + 1, 1 : n + 1] = torch.bmm(G, G.transpose(1, 2)) + lam * torch.eye(n)[None]
        alpha = torch.linalg.solve(H[:, : n + 1, : n + 1], y[:, : n + 1])[:, 1 : n + 1, 0]
        X[:, k % m] = (alpha[:, None] @ F[:, :n])[:, 0]
        F[:, k % m] = f(X[:, k % m])
        residual = (F[:, k % m] - X[:, k % m]).norm().item() / (1e-5 + F[:, k % m].norm().item())
        if residual < tol:
            break
    return X[:, k % m]


class Bare(GeneralContestant):
    """Not a solver: the calls of the cell and the products that fastdeq's "auto" makes."""

    def __init__(
        self,
        problem: GeneralProblem,
        f_setting: float,
        b_setting: float,
        cell: nn.Module | None = None,
        *,
        counts: Counts | None = None,
    ):
        super().__init__(problem, f_setting, b_setting, cell)
        self.counts = counts or Counts()
        self.at = mapped(lambda part: part.clone().requires_grad_(), problem.start)
        self.value = self.call_with_graph()

    def call(self) -> None:
        with torch.no_grad():
            self.cell(self.problem.start, self.x)

    def call_with_graph(self) -> State:
        return self.cell(self.at, self.x)

    def product(self) -> None:
        self._pass(tensors(self.at))

    def other_pass(self) -> None:
        self._pass(self.leaves)

    def _pass(self, inputs: tuple[Tensor, ...]) -> None:
        given = tensors(self.problem.grad)
        torch.autograd.grad(tensors(self.value), inputs, given, retain_graph=True)

    def run(self) -> None:
        steps = (
            (self.counts.calls, self.call),
            (self.counts.graph_calls, self.call_with_graph),
            (self.counts.products, self.product),
            (self.counts.other_passes, self.other_pass),
        )
        for count, step in steps:
            for _ in range(count):
                step()


def count(build: Callable[..., GeneralContestant], problem: GeneralProblem, mode: str) -> Counts:
    """What a contestant does in ``mode``, but for a first call, in which fastdeq looks whether
    samples are independent; ``build`` takes the cell."""
    cell = Counted(problem.cell)
    contestant = build(cell)
    if mode == "forward":
        contestant.infer()
        return cell.counts
    contestant.attached()
    cell.counts = Counts()
    state = contestant.attached()
    if mode == "backward":
        cell.counts = Counts()
    contestant.gradients(state)
    return cell.counts
