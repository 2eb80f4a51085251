"""What a solve returns, and what happens when part of it failed."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import constants
from .cuda_stream import is_capturing
from .errors import warn_caller
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
        value: the best finite iterate of each sample, shaped like the state (a tensor or a tuple
            of them). Detached when read from ``DEQLayer.last_solution``.
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
        rows = as_rows(self.value, resolve(self.batch_dim, [self.value])).to(self.residual.dtype)
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
        return (
            f"{self.status.numel()} samples: {counts}; iterations {int(self.iterations.min())} to "
            f"{int(self.iterations.max())}; worst residual {float(self.residual.max()):.1e}"
        )

    def __repr__(self) -> str:
        return f"Solution({self.summary()})"


class ConvergenceError(RuntimeError):
    """A solve failed for at least one sample and ``on_failure="raise"``; carries ``.solution``."""

    def __init__(self, message: str, solution: Solution):
        super().__init__(message)
        self.solution = solution


class ConvergenceWarning(UserWarning):
    """A solve failed for at least one sample and ``on_failure="warn"``."""


OnFailure = Literal["warn", "raise", "ignore"]
ON_FAILURE: tuple[OnFailure, ...] = get_args(OnFailure)

# What to try, by what it changes: one piece of advice for each, the last one given.
_ADVICE: dict[Status, dict[str, str]] = {
    Status.MAX_ITER: {
        "max_iter": "raise {max_iter}",
        "tol": "raise {tol}",
        "solver": "try another {kind}",
    },
    Status.STAGNATED: {
        "tol": "raise {tol} (the rounding floor of the cell's dtype may lie above it)",
        "solver": 'take {solver}="auto" where it is another',
        "scale": "reduce the weight scale (with an unbounded activation such as relu there may be "
        "no equilibrium)",
        "weight": "use orthogonal or symmetric weights",
    },
    Status.NONFINITE: {"input": "look for NaN or infinity in the input, the weights and the cell"},
}

_NAMES = {"max_iter": "max_iter", "tol": "tol", "solver": "solver", "kind": "solver"}
_ADJOINT_NAMES = {
    "max_iter": "adjoint_max_iter",
    "tol": "adjoint_tol",
    "solver": "adjoint",
    "kind": "adjoint solver",
}

# A wider window of Anderson acceleration is suggested for residuals below the first of these, and
# above the second in units of the machine epsilon: the others hardly fell, or fell to a rounding
# floor. docs/how-it-works.md has measurements.
_FELL_BELOW = 0.03
_ABOVE_FLOOR = 200


def _epsilon(solution: Solution) -> float:
    """Of the lowest precision that the map may have been evaluated in."""
    parts = tree_leaves(solution.value)
    dtypes = [p.dtype for p in parts if isinstance(p, Tensor) and p.is_floating_point()]
    device = solution.residual.device.type
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    return max(torch.finfo(dtype).eps for dtype in (*dtypes, solution.residual.dtype))


def _wider_window(solution: Solution) -> str | None:
    """The solver with twice the window, where most samples that came to the limit used a full
    history to the end and their residuals fell; None elsewhere."""
    solver, rejects = solution.solver, solution.rejects
    window = getattr(solver, "window", None)
    reached = solution.status == int(Status.MAX_ITER)
    stagnated = solution.status == int(Status.STAGNATED)
    if not isinstance(window, int) or not dataclasses.is_dataclass(solver) or stagnated.any():
        return None
    steps, residual = solution.iterations, solution.residual
    fell = (residual < _FELL_BELOW) & (residual > _ABOVE_FLOOR * _epsilon(solution))
    if solution.trend is not None:
        fell = fell & solution.trend.fell()
    # Each step taken back starts a new history, which is to be filled twice over on average; a
    # column is dropped where the history holds all there is.
    none = torch.zeros_like(steps)
    histories = 1 + rejects.get("safeguard", none) + rejects.get("weight_cap", none)
    full = (2 * window * histories <= steps) & (4 * rejects.get("rank_cut", none) <= steps)
    if not 2 * int((reached & fell & full).sum()) > int(reached.sum()):
        return None
    try:
        wider = dataclasses.replace(solver, window=2 * window)  # type: ignore[type-var]
    except (TypeError, ValueError):  # more than it may have
        return None
    options = [
        f"{f.name}={getattr(wider, f.name)!r}"
        for f in dataclasses.fields(wider)
        if f.init and getattr(wider, f.name) != f.default
    ]
    return f"{type(wider).__name__}({', '.join(options)})"


def _to_try(solution: Solution, seen: list[Status], adjoint: bool) -> str:
    """Advice for the statuses ``seen``, in the names of the options of the solve or its adjoint."""
    names = _ADJOINT_NAMES if adjoint else _NAMES
    advice: dict[str, str] = {}
    for status in seen:
        advice |= {key: text.format(**names) for key, text in _ADVICE[status].items()}
    wider = _wider_window(solution)
    if wider is not None:
        advice["solver"] = f"take a longer history, {names['solver']}={wider}"
    *most, last = advice.values()
    return f"{', '.join(most)}, or {last}" if most else last


def failure_message(solution: Solution, what: str, worst: int = 3) -> str:
    """Names the worst samples, their status and residual, and what to try.

    ``what`` names the solve, and ends with "adjoint solve" where that is the one.
    """
    failed = torch.nonzero(~solution.converged).flatten()
    order = torch.argsort(solution.residual[failed].nan_to_num(nan=torch.inf), descending=True)
    rows = failed[order[:worst]].tolist()
    named = "; ".join(
        f"sample {i}: {Status(int(solution.status[i])).name}, residual "
        f"{float(solution.residual[i]):.1e} after {int(solution.iterations[i])} iterations"
        for i in rows
    )
    seen = sorted({Status(int(s)) for s in solution.status[failed].unique()})
    advice = _to_try(solution, seen, what.endswith("adjoint solve"))
    return (
        f"{what}: {len(failed)} of {len(solution.status)} samples did not converge ({named}). "
        f"The solution holds their best finite iterates. To try: {advice}."
    )


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


def handle_failure(solution: Solution, on_failure: str, what: str) -> bool:
    """Applies the policy; returns True when it warned, so that a caller can warn only once.

    Nothing is looked at where there are no numbers: see ``may_look``.
    """
    if on_failure == "ignore" or not may_look(solution.status):
        return False
    if not bool(solution.status.any()):  # CONVERGED is 0
        return False
    message = failure_message(solution, what)
    if on_failure == "raise":
        raise ConvergenceError(message, solution)
    warn_caller(message, ConvergenceWarning)
    return True
