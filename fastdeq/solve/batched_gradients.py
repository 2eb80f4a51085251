"""Gradients and tangents that arrive batched, by ``torch.func.vmap`` or by autograd itself.

The batched tensors of autograd (``is_grads_batched``, ``vectorize``) are its own; few operations
know them. Here they become those of ``torch.func.vmap``, or one tensor with a dimension more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import Function, forward_ad

Gradients = tuple[Tensor | None, ...]


def is_batched(grad: Tensor) -> bool:
    """Whether there is more than one gradient in ``grad``, behind its shape."""
    if torch.compiler.is_compiling():
        return False
    return is_functorch_wrapped_tensor(grad) or is_legacy_batchedtensor(grad)


def for_each(function: Callable[..., Gradients], *given: Tensor | None) -> Gradients:
    """``function(*given)``, which knows ``torch.func.vmap``, for gradients or tangents of which
    some are batched by autograd itself."""
    if torch.compiler.is_compiling():
        return function(*given)
    batched = [t is not None and is_legacy_batchedtensor(t) for t in given]
    if not any(batched):
        return function(*given)
    level = _level()
    there: list[bool] = []

    def of_one(*rows: Tensor) -> tuple[Tensor, ...]:
        each = iter(rows)
        found = function(*[next(each) if b else t for t, b in zip(given, batched, strict=True)])
        there[:] = [t is not None for t in found]
        return tuple(t for t in found if t is not None)

    rows = [
        torch._remove_batch_dim(t, level, 1, 0)
        for t, b in zip(given, batched, strict=True)
        if b and t is not None
    ]
    results = iter(torch.func.vmap(of_one)(*rows))
    return tuple(
        torch._add_batch_dim(next(results), 0, level) if known else None for known in there
    )


def tangent_of(rule: Callable[..., tuple[Tensor]], *moved: Tensor | None) -> Tensor:
    """``rule(*moved)`` of tangents; where transforms are nested, the outer ones follow it."""
    outer = torch._C._functorch.peek_interpreter_stack() is not None
    with forward_ad._set_fwd_grad_enabled(True) if outer else contextlib.nullcontext():
        (tangent,) = for_each(rule, *moved)
    assert tangent is not None
    return tangent


def stacked(t: Tensor, dim: int | None, count: int) -> Tensor:
    """What ``torch.func.vmap`` batches along ``dim``, with that dimension first; ``count`` times
    the same where it is None."""
    return t.expand(count, *t.shape) if dim is None else t.movedim(dim, 0)


def _level() -> int:
    """The level of autograd's own batches."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


#: Gradients ``(V, *)`` for V gradients ``(V, B, n)`` of a solution.
Many = Callable[[Tensor], tuple[Tensor, ...]]


class _Unbatched(Function):
    """``many(grad)`` for gradients that ``torch.func.vmap`` batches."""

    @staticmethod
    def forward(many: Many, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(t[0] for t in many(grad.unsqueeze(0)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "a batched gradient of a general fixed point, by torch.func.vmap around "
            "torch.autograd.grad, cannot be differentiated again; use torch.func.vjp or "
            "torch.func.jacrev, or is_grads_batched=True."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, many: Many, grad: Tensor) -> Any:
        rows = grad.movedim(in_dims[1], 0)

        def of_all(outer: Tensor) -> tuple[Tensor, ...]:  # where vmaps are nested
            found = many(outer.flatten(0, 1))
            return tuple(t.unflatten(0, (len(outer), -1)) for t in found)

        found = _Unbatched.apply(of_all, rows)
        return found, (0,) * len(found)


def as_one(many: Many, grad: Tensor) -> tuple[Tensor, ...]:
    """``many`` of what is batched in ``grad``, batched in the same way."""
    if not is_legacy_batchedtensor(grad):
        return _Unbatched.apply(many, grad)  # type: ignore[no-any-return]
    level = _level()
    found = many(torch._remove_batch_dim(grad, level, 1, 0))
    return tuple(torch._add_batch_dim(t, 0, level) for t in found)
