"""What a solve says of itself, per sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....constants import RESIDUAL_EPS

_KEYS = {
    "abs_lowest": (1,),
    "rel_lowest": (1,),
    "abs_trace": (1, 1),
    "rel_trace": (1, 1),
    "nstep": (1,),
    "sradius": (1,),
}


class SolverStat(dict[str, Any]):
    """Statistics of a solve of B samples; what is not known is -1.

    Keys:
        abs_lowest, rel_lowest: ``(B,)``, the least ``|f(z) - z|``, and the same over ``|f(z)|``.
        abs_trace, rel_trace: ``(B, N)``, both along the solve. The first column is 1e8.
        nstep: ``(B,)`` float, the step of the least one.
        sradius: ``(B,)``, an estimate of the spectral radius, where it was asked for.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for key, shape in _KEYS.items():
            if key not in self:
                self[key] = torch.full(shape, -1.0)

    @classmethod
    def from_solver_info(
        cls,
        stop_mode: str,
        lowest_dict: dict[str, Tensor],
        trace_dict: dict[str, list[Tensor]],
        lowest_step_dict: dict[str, Tensor],
    ) -> SolverStat:
        """Of what a solver has kept under "abs" and "rel": the least residuals, the residuals of
        each step, and the steps of the least ones."""
        return cls(
            abs_lowest=lowest_dict["abs"],
            rel_lowest=lowest_dict["rel"],
            abs_trace=torch.stack(trace_dict["abs"], dim=1),
            rel_trace=torch.stack(trace_dict["rel"], dim=1),
            nstep=lowest_step_dict[stop_mode],
        )

    @classmethod
    def from_residuals(cls, absolute: Tensor, relative: Tensor, nstep: Tensor) -> SolverStat:
        """Of one pair of residuals for each sample, ``(B,)``."""
        return cls(
            abs_lowest=absolute,
            rel_lowest=relative,
            abs_trace=absolute.unsqueeze(1),
            rel_trace=relative.unsqueeze(1),
            nstep=nstep,
        )

    @classmethod
    def from_final_step(cls, z: Any, fz: Any, nstep: int = 0) -> SolverStat:
        """Of the last step alone: a state, or several parts, and its value."""
        z, fz = _rows(z), _rows(fz)
        absolute = (fz - z).norm(dim=1)
        relative = absolute / (fz.norm(dim=1) + RESIDUAL_EPS)
        steps = torch.full((len(z),), float(nstep), device=z.device)
        return cls.from_residuals(absolute, relative, steps)


def _rows(state: Any) -> Tensor:
    parts = (state,) if isinstance(state, Tensor) else tuple(state)
    flat = [p.flatten(1) if p.dim() >= 2 else p.reshape(-1, 1) for p in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)
