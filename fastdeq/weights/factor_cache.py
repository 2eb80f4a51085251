"""The orthogonal factor of a matrix under every transform of PyTorch, and the cache that keeps it
until the matrix changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..cuda_stream import is_capturing
from ..ops.gram_schmidt import Factors
from ..ops.kept_factors import Kept, keep
from ..ops.orthogonal_factor import factors, memory, pull_back, pull_back_q


def is_transformed(raw: Tensor) -> bool:
    """Whether values are not to be looked at: traced, batched, dual, fake."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or type(raw) not in (Tensor, nn.Parameter)
        or raw.device.type == "meta"
    )


def has_tangent(raw: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    # unpack_dual itself fails outside of a level.
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(raw).tangent is not None


def orthogonal_factor(raw: Tensor) -> Tensor:
    """Q ``(m, n)`` of ``raw = Q R``, ``m >= n``, with a positive diagonal of R.

    Unique and differentiable, twice as well, where raw has full rank; at lower rank Q is still
    orthogonal, and its gradient need not be finite. Entries that are not finite give NaN. Haar
    distributed where raw has independent normal entries (Mezzadri, Notices AMS 54 (2007) 592).
    Runs in float32 for narrower dtypes. ``torch.func`` transforms and forward-mode derivatives
    work too.

    Raises:
        ValueError: raw is not a matrix, or is wide.
    """
    return _factor(raw, remember=False)


def _factor(raw: Tensor, remember: bool) -> Tensor:
    if has_tangent(raw):
        return _by_torch(raw)
    q: Tensor = torch.ops.fastdeq.orthogonal_factor(wide_dtype(raw), "auto", remember)[0]
    return q.to(raw.dtype)


def wide_dtype(raw: Tensor) -> Tensor:
    return raw if raw.dtype == torch.float64 else raw.float()


def _by_torch(raw: Tensor) -> Tensor:
    """The same in operations that every transform of PyTorch knows."""
    if raw.dim() != 2 or raw.shape[0] < raw.shape[1]:
        raise ValueError(
            f"orthogonal_factor needs a matrix (m, n) with m >= n, got {tuple(raw.shape)}."
        )
    with torch.autocast(raw.device.type, enabled=False):
        q, r = torch.linalg.qr(wide_dtype(raw))
        sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
        factor: Tensor = (q * sign).to(raw.dtype)
        return factor


class Attach(torch.autograd.Function):
    """Factors computed before, as functions of the matrix they belong to."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, found: Factors) -> tuple[Tensor, Tensor]:
        # Views, so that these are new tensors. The detached raw lets a dispatch mode see raw.
        raw.detach()
        q, r = found.q.detach(), found.r.detach()
        ctx.save_for_backward(q, r)
        ctx.inverses = found.inverses
        ctx.set_materialize_grads(False)
        return q, r

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor | None, grad_r: Tensor | None) -> tuple[Any, ...]:
        q, r = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            if grad_r is None and grad_q is not None and not torch.is_grad_enabled():
                return pull_back_q(q, r, grad_q, ctx.inverses), None
            return pull_back(q, r, grad_q, grad_r), None


class FactorCache:
    """Q and R of the matrix that was factorised last, for as long as it does not change.

    How a change is seen: ops/kept_factors.py. Off the CPU an edit of ``matrix.data`` is not: call
    ``clear()`` after one.

    A matrix whose factorisation has been recorded in a CUDA graph is factorised at every call from
    then on, until ``clear()``: a replay may change it. Where only the optimiser's step is recorded,
    call that after each replay. Nothing in the cache is ever handed out for a user to write to. A
    lookup is one read and a miss one assignment of an immutable entry, so threads may share a
    cache. Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self._entry: Kept | None = None
        self._recorded = False

    def clear(self) -> None:
        """Forgets the factors, and any recording in a CUDA graph; also those of compiled code."""
        self._entry, self._recorded = None, False
        memory.clear()

    def orthogonal(self, raw: Tensor) -> Tensor:
        """``orthogonal_factor(raw)``, or for a wide matrix that of its transpose, transposed.

        Not to be written to, as it may be the cached one.
        """
        wide = wide_dtype(raw)
        tall = wide if raw.shape[0] >= raw.shape[1] else wide.t()
        if is_transformed(raw) or has_tangent(raw):
            # A compiled program does not come here again: its operator is to remember.
            q = _factor(tall, remember=torch.compiler.is_compiling())
        else:
            with torch.inference_mode(False), torch.no_grad():
                found = self._find(raw, tall.detach())
            if torch.is_grad_enabled() and raw.requires_grad:
                q = Attach.apply(tall, found)[0]
            else:
                q = found.q
        return (q if tall is wide else q.t()).to(raw.dtype)

    def _find(self, raw: Tensor, tall: Tensor) -> Factors:
        if is_capturing(raw.device):
            # A replay is to factorise anew, and it changes the matrix but not its version.
            self._entry, self._recorded = None, True
        # Normal tensors even of an inference tensor: autograd may save them at a later hit.
        tall = tall.clone() if tall.is_inference() else tall
        if self._recorded:
            return factors(tall)
        entry = self._entry
        if entry is not None and entry.holds_for(raw):
            return entry.found
        found = factors(tall)
        self._entry = keep(raw, found)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> FactorCache:
        return FactorCache()

    def __reduce__(self) -> tuple[type[FactorCache], tuple[()]]:
        return FactorCache, ()
