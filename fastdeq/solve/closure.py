"""Which tensors a function closes over, found by watching one evaluation of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ClosureTracker(TorchDispatchMode):
    """Collects tensors that require grad and reach an operation without having arisen inside.

    Compiled functions run eagerly under a dispatch mode, so what they close over is seen as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inside: dict[int, Tensor] = {}
        self._seen: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and t.requires_grad and id(t) not in self._inside:
                self._seen[id(t)] = t
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            # Views and casts of a parameter require grad even under no_grad. An operation may
            # return its argument: that did not arise here.
            if isinstance(t, Tensor) and id(t) not in self._seen:
                self._inside[id(t)] = t
        return out

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What came from outside, each once."""
        return tuple(self._seen.values())


@contextlib.contextmanager
def cut_above(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within it, no gradient passes above the given tensors, while their own is still captured.

    One of them may depend on another (a matrix and its factor, both used by f). Asking autograd for
    both would count the path between them, which is for the caller's graph to follow. Their hooks
    and retained gradients rest meanwhile, for the same reason: the caller's graph runs them.

    The hooks belong to graph nodes, so two threads must not differentiate through one graph twice
    at the same time.
    """
    handles: list[Any] = []
    resting = []
    for t in tensors:
        retained = t.grad if not t.is_leaf and t.retains_grad else None
        hooks = dict(t._backward_hooks) if t._backward_hooks else {}
        resting.append((t, hooks, retained))
        if hooks:
            t._backward_hooks.clear()  # type: ignore[union-attr]
        if t.grad_fn is not None:
            # Autograd reads its result before these hooks, and None costs nothing further up.
            def drop(grads: tuple[Tensor | None, ...], index: int = t.output_nr) -> Any:
                return tuple(None if i == index else g for i, g in enumerate(grads))

            handles.append(t.grad_fn.register_prehook(drop))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for t, hooks, retained in resting:
            if hooks:
                t._backward_hooks.update(hooks)  # type: ignore[union-attr]
            if not t.is_leaf and t.retains_grad:
                t.grad = retained
