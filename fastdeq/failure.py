"""What happens when part of a solve failed: what is said, and how."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .errors import warn_caller
from .solution import Solution, Status, may_look


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

_REVERSIBLE = (
    'raise max_iter or tol, take another beta, or another gradient than "reversible"',
    "raise adjoint_tol (the residual estimates the relative error), take a smaller beta, or "
    'another gradient than "reversible"',
)
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
    tensors = [p for p in parts if isinstance(p, Tensor)]
    dtypes = [p.dtype for p in tensors if p.is_floating_point() or p.is_complex()]
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
    general = solution.path.startswith("general") and not adjoint
    if general and not bool(solution.converged.any()):
        advice["randomness"] = 'pass randomness="same" if the cell draws random numbers (dropout)'
    wider = _wider_window(solution)
    if wider is not None:
        advice["solver"] = f"take a longer history, {names['solver']}={wider}"
    if getattr(solution.solver, "name", "") == "reversible":
        advice = {"gradient": _REVERSIBLE[adjoint]}
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
