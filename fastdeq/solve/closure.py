"""Which tensors a function closes over: found in the graph of one evaluation of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backends import extension
from .batched_gradients import is_batched
from .eager import Eagerly
from .held import held_tensors

Map = Callable[[Tensor], Tensor]
Edge = tuple[Any, int]  # a node of the graph, and which of its outputs

_NOTHING = torch.zeros((), requires_grad=True)
_ACCUMULATE: Any = type(torch.autograd.graph.get_gradient_edge(_NOTHING).node)  # nodes of leaves


class Above(Function):
    """z, placed in the graph above every one of ``tensors``; no gradient goes on from it.

    Autograd visits everything that is reachable, however far up, unless its topological number (the
    longest way to a leaf) is below those of all tensors that a gradient is asked for. Here lies a
    state at which a map is evaluated: a vector-Jacobian product with respect to it stops at what
    the map closes over.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return z.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


def placed_above(z: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """The values of z, requiring a gradient, in the graph above those of ``tensors`` that are not
    leaves."""
    inner = [t for t in tensors if t.grad_fn is not None]
    with torch.enable_grad():
        at: Tensor = Above.apply(z.detach(), *(inner or (_NOTHING,)))
    return at


class Evaluation(NamedTuple):
    """``value = f(at)``, and theta, the tensors that f closes over and that require grad."""

    at: Tensor
    value: Tensor
    theta: list[Tensor]


def evaluate(f: Map, z: Tensor) -> Evaluation:
    """f at z ``(B, n)`` under autograd, run eagerly, and what it closes over.

    What came from outside are the edges of the graph to leaves and to nodes that are older than the
    evaluation. A leaf's node knows its tensor. The tensors of other edges are among those that f
    holds: in its arguments and closure, else anywhere. The first are known beforehand, so that the
    state is placed above them; if these were not the right ones, f is evaluated once more. If some
    cannot be found, the operations of an evaluation are watched.
    """
    held = list(held_tensors(f))
    if len(held) > 1:
        held = list({edge_of(t): t for t in held}.values())
    for _ in range(2):
        at = placed_above(z, held)
        with torch.enable_grad(), Eagerly():
            value = f(at)
        leaves = outer_leaves(value, at, held)
        if leaves is not None:
            return Evaluation(at, value, [t for t in leaves if t is not _NOTHING] + held)
        edges = _outer_edges(value, at, held)
        inner = {edge for edge in edges if not isinstance(edge[0], _ACCUMULATE)}
        held = _tensors_of(inner, f, held)
        if len(held) < len(inner):
            break
    at = placed_above(z, held)
    with torch.enable_grad(), Eagerly(), ClosureTracker() as tracker:
        value = f(at)
    return Evaluation(at, value, [t for t in tracker.tensors if t is not at])


def edge_of(t: Tensor) -> Edge:
    """Where the gradient of t, which is not a leaf, goes."""
    return t.grad_fn, t.output_nr


def reference_outer_leaves(value: Tensor, at: Tensor, known: list[Tensor]) -> list[Tensor] | None:
    """The leaves that the graph of an evaluation ends at, from ``value`` to the state ``at``; None
    where the other tensors that it ends at are not those ``known``."""
    edges = _outer_edges(value, at, known)
    inner = {edge for edge in edges if not isinstance(edge[0], _ACCUMULATE)}
    return _leaves(edges) if inner == set(map(edge_of, known)) else None


# The extension's takes a tenth of the time.
outer_leaves = getattr(extension.module, "outer_leaves", reference_outer_leaves)


def _outer_edges(value: Tensor, at: Tensor, known: list[Tensor]) -> list[Edge]:
    """Edges from the graph of an evaluation that began with the state ``at`` to what is not of it:
    leaves, and nodes made before, or of tensors that were ``known`` before."""
    root, begin = value.grad_fn, at.grad_fn
    if root is None or begin is None:
        return []
    first, last = begin._sequence_nr(), root._sequence_nr()
    # Each thread counts by itself, so a node of another one may have any number.
    outside = {node for node, _ in map(edge_of, known)}
    found: dict[Edge, None] = {}
    seen: set[Any] = {root}
    stack: list[Any] = [root]
    while stack:
        for edge in stack.pop().next_functions:
            node = edge[0]
            if node in seen or node is None or node is begin:
                continue
            if first < node._sequence_nr() <= last and node not in outside:
                seen.add(node)
                stack.append(node)
            else:
                found[edge] = None
    return list(found)


def _leaves(edges: Iterable[Edge]) -> list[Tensor]:
    return [node.variable for node, _ in edges if isinstance(node, _ACCUMULATE)]


def _tensors_of(edges: set[Edge], f: Map, held: list[Tensor]) -> list[Tensor]:
    """The tensors of ``edges``, as far as they are among ``held`` or f holds them."""
    found = {edge_of(t): t for t in held if edge_of(t) in edges}
    if len(found) < len(edges):
        for t in held_tensors(f, everywhere=True):
            if edge_of(t) in edges:
                found[edge_of(t)] = t
                if len(found) == len(edges):
                    break
    return list(found.values())


def same_closure(f: Map, theta: Sequence[Tensor]) -> Map:
    """f, run eagerly; raises where it uses tensors that are neither theta nor made of theta."""
    known = set(map(id, theta))

    def checked(z: Tensor) -> Tensor:
        with Eagerly():
            value = f(z)
            if is_batched(value):
                return value  # its graph is that of a transform
            above = {t.grad_fn for t in (z, *theta)}
            new = [t for t in _leaves_above(value, above) if id(t) not in known]
            if new:  # or leaves that f makes itself
                with ClosureTracker() as tracker:
                    f(z)
                new = [t for t in tracker.tensors if t is not z and id(t) not in known]
        if new:
            raise RuntimeError(
                f"the map used tensors of shapes {[tuple(t.shape) for t in new]} at the backward "
                "pass that it did not use at the forward pass; it must be the same map at both."
            )
        return value

    return checked


def _leaves_above(value: Tensor, above: set[Any]) -> list[Tensor]:
    """Leaves that are reached from value without passing the nodes ``above``."""
    found: dict[Edge, None] = {}
    seen, stack = set(above), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, _ACCUMULATE):
            found[node, 0] = None
        stack += [below for below, _ in node.next_functions]
    return [t for t in _leaves(found) if t is not _NOTHING]


class ClosureTracker(TorchDispatchMode):
    """Collects tensors that require grad and reach an operation without having arisen inside."""

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
