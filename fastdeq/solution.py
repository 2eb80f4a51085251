"""What a solve returns, and what happens when part of it failed."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import constants
from .cuda_stream import is_capturing
from .samples import BatchDim, as_rows, resolve


class Status(enum.IntEnum):
    """Outcome of the solve for one sample; compares with the integers in ``Solution.status``."""

    CONVERGED = constants.STATUS_CONVERGED  #: ``|f(z) - z| <= atol + tol |f(z)|``
    MAX_ITER = constants.STATUS_MAX_ITER  #: the iteration limit came first
    STAGNATED = (
        constants.STATUS_STAGNATED
    )  #: the residual stopped improving, e.g. at the rounding floor
    NONFINITE = constants.STATUS_NONFINITE  #: the cell returned NaN or infinity for this sample


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """Result of a fixed-point or linear solve of a batch of B samples.

    B counts the samples in row-major order of the batch dimensions, and is 1 with
    ``batch_dim=None``. Compared and hashed by identity.

    Attributes:
        value: the best finite iterate of each sample, a state (a tensor or a structure of them).
            Detached when read from ``DEQLayer.last_solution``.
        status: ``(B,)`` int8, values of :class:`Status`.
        iterations: ``(B,)`` int32, updates made for the sample until it stopped. Verifying the
            last one takes one further evaluation of the cell.
        residual: ``(B,)`` float32 or float64, ``|f(z) - z| / (|f(z)| + 1e-9)`` of ``value``,
            2-norms per sample, measured before any rounding of ``value`` to a half-precision type;
            of a state with several parts that of the part which is furthest from its tolerance.
        rejects: per-sample counters ``(B,)`` int32 of steps a solver took back, by reason.
        error_bound: ``(B,)`` or None, what the distance to the equilibrium cannot exceed.
        contraction: a bound on the Lipschitz constant of the map in the 2-norm, None if unknown.
        solver: the solver object that made it, the one that "auto" chose for instance; None if
            unknown.
        observed_contraction: ``(B,)``, the rate at which plain steps of a general map reduced the
            residual norm at last, NaN for samples without such steps; None for other solves.
        error_estimate: ``(B,)`` or None, about how far ``value`` is from the equilibrium.
        batch_dim: which dimensions of ``value`` count samples, as in ``DEQLayer``.
        evaluations: how often the solve called the map, or made a product with its Jacobian in an
            adjoint solve; None in a fused solve, where each sample has a count of its own.
        sample_evaluations: the samples in these calls; less than B for each where finished
            samples were left out (``compact``). A forward solve's comparisons are counted.
        narrow_evaluations: how many of these calls were in bfloat16 (``precision="mixed"``).
        limited: ``(B,)`` bool, of an adjoint with ``adjoint_limit``: which samples were scaled down
            to it; None elsewhere. Status, iterations and residual are those of the solve before.
        path: "fused" or "general", with the reason where an ``AffineCell`` is solved as a general
            map, and what became of ``compact`` in this direction.
    """

    value: Any
    status: Tensor
    iterations: Tensor
    residual: Tensor
    rejects: Mapping[str, Tensor] = field(default_factory=dict)
    contraction: float | None = None
    solver: Any = None
    observed_contraction: Tensor | None = None
    batch_dim: BatchDim = 0
    trend: Any = field(default=None, repr=False)  # a solve.trend.Trend, where one was kept
    evaluations: int | None = None
    sample_evaluations: int | None = None
    narrow_evaluations: int = 0
    path: str = ""
    limited: Tensor | None = None
    kept: Any = field(default=None, repr=False)  # what a solver hands on to the adjoint

    @property
    def converged(self) -> Tensor:
        """``(B,)`` bool: which samples met the tolerance."""
        return self.status == int(Status.CONVERGED)

    @property
    def nonfinite(self) -> Tensor:
        """``(B,)`` bool: which samples ended NONFINITE."""
        return self.status == int(Status.NONFINITE)

    @property
    def error_bound(self) -> Tensor | None:
        """``(B,)``: what ``|value - z*|``, 2-norm, cannot exceed; None where that is not known.

        It is known where the map contracts for certain, by s < 1 (``weight="orthogonal"`` with a
        scale below 1 and a nonexpansive activation, say): ``|z - z*| <= |f(z) - z| / (1 - s)``. The
        rounding of one evaluation, of the weight and of ``value`` is allowed for by 8 units in the
        last place of ``value``. Infinite where the residual is 1 or more.
        """
        if self.contraction is None or not isinstance(self.value, Tensor):
            return None
        eps = torch.finfo(self.value.dtype).eps
        s = self.contraction * (1 + 8 * eps)
        if s >= 1:
            return None
        size = self._size()
        # |r| <= residual (|f(z)| + 1e-9) and |f(z)| <= |z| + |r|.
        left = 1 - self.residual
        length = torch.where(
            left > 0, self.residual * (size + constants.RESIDUAL_EPS) / left, torch.inf
        )
        bound: Tensor = (length + 8 * eps * size) / (1 - s)
        return bound

    @property
    def error_estimate(self) -> Tensor | None:
        """``(B,)``: about ``|value - z*|``, 2-norm, where the contraction was seen: the residual
        norm over ``1 - s``, s being ``observed_contraction``. NaN where s is not below 1; None
        where nothing was seen: in accelerated solves, and in those of an ``AffineCell``.

        An estimate from one rate: exact for a multiple of an orthogonal matrix, too small where
        slower directions than those seen at last are left.
        """
        s = self.observed_contraction
        if s is None or not isinstance(self.value, Tensor):
            return None
        length = self.residual * (self._size() + constants.RESIDUAL_EPS)
        estimate: Tensor = torch.where(s < 1, length / (1 - s), torch.nan)
        return estimate

    def _size(self) -> Tensor:
        rows = as_rows(self.value, resolve(self.batch_dim, [self.value]))
        if not rows.is_complex():
            rows = rows.to(self.residual.dtype)
        size: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return size

    def with_value(self, value: Any) -> Solution:
        """The same solution with its value in another form."""
        return replace(self, value=value)

    def summary(self) -> str:
        """One line for people: counts per status, iterations and the worst residual."""
        if self.status.numel() == 0:
            return "0 samples"
        if not may_look(self.status):
            return f"{self.status.numel()} samples: not to be looked at"
        counts = ", ".join(
            f"{int((self.status == s).sum())} {s.name}" for s in Status if (self.status == s).any()
        )
        text = (
            f"{self.status.numel()} samples: {counts}; iterations {int(self.iterations.min())} to "
            f"{int(self.iterations.max())}; worst residual {float(self.residual.max()):.1e}"
        )
        return text if self.limited is None else f"{text}; {int(self.limited.sum())} limited"

    def __repr__(self) -> str:
        return f"Solution({self.summary()})"


def may_look(t: Tensor) -> bool:
    """Whether t has numbers that may be read: it is not fake, traced, batched, on the meta device,
    or yet to be computed by a CUDA graph that is being recorded."""
    return not (
        torch.compiler.is_compiling()
        or type(t) not in (Tensor, torch.nn.Parameter)
        or t.device.type == "meta"
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
        or is_capturing(t.device)
    )
