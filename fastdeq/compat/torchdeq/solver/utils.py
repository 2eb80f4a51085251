"""Pieces for solvers of one's own: residuals by sample, and the best state so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .stat import SolverStat

solver_stat_from_info = SolverStat.from_solver_info
solver_stat_from_final_step = SolverStat.from_final_step


def dummy_solver_stat() -> SolverStat:
    """Statistics of nothing, each -1."""
    return SolverStat()


def init_solver_info(bsz: int, device: Any, init_loss: float = 1e8) -> tuple[Any, Any, Any]:
    """Traces, least residuals and their steps for ``bsz`` samples, each under "abs" and "rel"."""
    modes = ("abs", "rel")
    lowest = {mode: torch.full((bsz,), init_loss, device=device) for mode in modes}
    trace = {mode: [lowest[mode].clone()] for mode in modes}
    steps = {mode: torch.zeros(bsz, device=device) for mode in modes}
    return trace, lowest, steps


def batch_masked_mixing(mask: Tensor, mask_var: Any, orig_var: Any) -> Tensor:
    """``mask_var`` for the samples in ``mask`` ``(B,)`` bool, ``orig_var`` for the others."""
    like = mask_var if isinstance(mask_var, Tensor) else orig_var
    if not isinstance(like, Tensor):
        raise ValueError("mask_var or orig_var must be a tensor.")
    return torch.where(mask.reshape(-1, *[1] * (like.dim() - 1)), mask_var, orig_var)


def batch_flatten(x: Tensor) -> Tensor:
    """``(B, n)``; each number of a vector is a sample."""
    return x.flatten(1) if x.dim() >= 2 else x.reshape(-1, 1)


def update_state(
    lowest_xest: Tensor,
    x_est: Tensor,
    nstep: int,
    stop_mode: str,
    abs_diff: Tensor,
    rel_diff: Tensor,
    trace_dict: dict[str, list[Tensor]],
    lowest_dict: dict[str, Tensor],
    lowest_step_dict: dict[str, Tensor],
    return_final: bool = False,
) -> Tensor:
    """Takes in the residuals of a step, and returns the best state so far; with ``return_final``
    the latest."""
    for mode, residual in (("abs", abs_diff), ("rel", rel_diff)):
        trace_dict[mode].append(residual)
        lower = (residual < lowest_dict[mode]) | return_final
        lowest_dict[mode] = batch_masked_mixing(lower, residual, lowest_dict[mode])
        lowest_step_dict[mode] = batch_masked_mixing(lower, float(nstep), lowest_step_dict[mode])
        if mode == stop_mode:
            lowest_xest = batch_masked_mixing(lower, x_est, lowest_xest).detach()
    return lowest_xest
