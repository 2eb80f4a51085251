"""The cache that keeps the symmetric part of a matrix, and its multiple with bounded eigenvalues,
until the matrix changes.

What is kept is handed out as views: a weight that did not change is one buffer in all graphs that
use it. Autograd takes them for functions of the matrix,

    S = (A + A^T) / 2     dA = (dS + dS^T) / 2
    W = m S               dS = m dW - <dW, S> m^2 / b v v^T,  m = b / lambda < 1, S v = lambda v
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cuda_stream import is_capturing
from ..ops import symmetric_part
from ..ops.kept_factors import compares_entries, version_of
from .eigenvalue_bound import bounded, shrinkage, surely_below
from .factor_cache import has_tangent, is_transformed, wide_dtype


def may_be_kept(raw: Tensor) -> bool:
    """Whether a function of raw may be another call's: nobody traces, transforms or listens."""
    return not (
        is_transformed(raw)
        or has_tangent(raw)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def symmetric_part_of(raw: Tensor) -> Tensor:
    """``(A + A^T) / 2``, a new tensor."""
    # a + b == b + a, so this is symmetric to the last bit, and so is a multiple of it.
    if is_transformed(raw) or has_tangent(raw):
        return symmetric_part.reference(raw)
    part: Tensor = torch.ops.fastdeq.symmetric_part(raw)
    return part


class _Kept(NamedTuple):
    """S and W of a matrix with what tells whether they still are."""

    part: Tensor
    bounded: Tensor  # the same tensor where nothing was to be shrunk
    factor: Tensor | None  # () W = factor S, None: W is S
    vector: Tensor | None  # (n,) where a gradient was wanted
    bound: float | None
    raw: weakref.ref[Tensor]
    version: tuple[Any, ...]
    own_versions: tuple[int, int]
    copy: Tensor | None  # of the matrix, where entries are compared and it was seen twice

    def may_hold_for(self, raw: Tensor, version: tuple[Any, ...], bound: float | None) -> bool:
        """Whether raw is the matrix, as far as its version tells."""
        if self.version[:3] != version[:3] or self.bound != bound:
            return False
        if self.own_versions != (self.part._version, self.bounded._version):
            return False  # somebody has written to a view
        if compares_entries(raw):
            # After an optimiser's step the version says so already.
            return self.raw() is not raw or self.version[-1] == version[-1]
        return version[-1] is not None and self.version == version and self.raw() is raw


def _compute(raw: Tensor, bound: float | None, with_vector: bool) -> _Kept:
    # A normal tensor even of an inference tensor: autograd may save it at a later hit.
    a = raw.detach().clone() if raw.is_inference() else raw.detach()
    part: Tensor = torch.ops.fastdeq.symmetric_part(a)
    whole, factor, vector = part, None, None
    with torch.autocast(part.device.type, enabled=False):
        if bound is not None and part.numel() > 0 and not surely_below(part, bound):
            factor, vector = shrinkage(part, bound, with_vector)
            whole = (wide_dtype(part) * factor).to(part.dtype)
    versions = part._version, whole._version
    at = weakref.ref(raw), version_of(raw)
    return _Kept(part, whole, factor, vector, bound, *at, versions, None)


def _confirmed(found: _Kept, raw: Tensor) -> _Kept | None:
    """What was found, if it is that of raw to the last bit."""
    if not compares_entries(raw):
        return found
    a = raw.detach()
    if found.copy is not None:
        return found if torch.equal(found.copy, a) else None
    if not torch.equal(found.part, torch.ops.fastdeq.symmetric_part(a)):
        return None
    return found._replace(copy=a.clone())


class _Part(torch.autograd.Function):
    """S, computed before, as a function of the matrix."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, part: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return part.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return None if grad is None else symmetric_part_of(grad), None


class _Multiple(torch.autograd.Function):
    """W, computed before, as a function of S."""

    @staticmethod
    def forward(
        ctx: Any, part: Tensor, whole: Tensor, factor: Tensor, vector: Tensor, bound: float
    ) -> Tensor:
        ctx.save_for_backward(part, factor, vector)
        ctx.bound = bound
        ctx.set_materialize_grads(False)
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        part, factor, vector = ctx.saved_tensors
        with torch.autocast(part.device.type, enabled=False):
            if torch.is_grad_enabled():
                (found,) = torch.autograd.grad(
                    bounded(part, ctx.bound), part, grad, create_graph=True
                )
                return found, None, None, None, None
            g, s = wide_dtype(grad), wide_dtype(part)
            v = vector.to(s.dtype)
            along = (g * s).sum() * factor * factor / ctx.bound
            along = torch.where(factor < 1, along, 0.0)
            found = factor * g - torch.outer(along * v, v)
            return found.to(part.dtype), None, None, None, None


class SymmetricCache:
    """S and W of the latest matrix, for as long as it does not change.

    How a change is seen: on the CPU entries are compared, with S at the second call and with a copy
    of the matrix from then on, so that a training step pays for neither; elsewhere address and
    version, which an edit of ``matrix.data`` does not change: call ``clear()`` after one. A matrix
    of which S was recorded in a CUDA graph is not looked up again until then: a replay may change
    it. What is handed out is made anew once an in-place operation has changed its version. A lookup
    is one read and a miss one assignment of an immutable entry, so threads may share a cache.
    Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self._entry: _Kept | None = None
        self._recorded = False

    def clear(self) -> None:
        """Forgets what is kept, and any recording in a CUDA graph."""
        self._entry, self._recorded = None, False

    def weight(self, raw: Tensor, bound: float | None) -> Tensor:
        """W ``(n, n)`` of raw, for which ``may_be_kept``; a view of what other calls get."""
        differentiable = torch.is_grad_enabled() and raw.requires_grad
        found = self._entry
        copy = None if found is None else found.copy
        if (
            found is None
            or copy is None
            or (differentiable and found.vector is None and found.factor is not None)
            or not found.may_hold_for(raw, version_of(raw), bound)
            or not torch.equal(copy, raw)
        ):
            with torch.inference_mode(False), torch.no_grad():
                found = self._find(raw, bound, differentiable)
        if not differentiable:
            return found.bounded.detach()
        part: Tensor = _Part.apply(raw, found.part)
        if found.factor is None:
            return part
        whole: Tensor = _Multiple.apply(part, found.bounded, found.factor, found.vector, bound)
        return whole

    def _find(self, raw: Tensor, bound: float | None, with_vector: bool) -> _Kept:
        if is_capturing(raw.device):
            # A replay is to compute anew, and it changes the matrix but not its version.
            self._entry, self._recorded = None, True
        if self._recorded:
            return _compute(raw, bound, with_vector)
        found = self._entry
        if found is not None and found.may_hold_for(raw, version_of(raw), bound):
            found = _confirmed(found, raw)
        else:
            found = None
        if found is None:
            self._entry = None  # never two of them in memory
            found = _compute(raw, bound, with_vector)
        elif with_vector and found.factor is not None and found.vector is None:
            assert bound is not None
            found = found._replace(vector=shrinkage(found.part, bound, True).vector)
        self._entry = found
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> SymmetricCache:
        return SymmetricCache()

    def __reduce__(self) -> tuple[type[SymmetricCache], tuple[()]]:
        return SymmetricCache, ()
