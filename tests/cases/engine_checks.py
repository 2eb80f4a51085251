"""How far apart two correct answers to one of engine_cases' problems may be.

With u, f, L and rho as there: a reported residual r puts the value within
``(r (|f| + eps) + rho) / (1 - L)`` of the solution, and iterates that have met nothing but rounding
are within ``rho / (1 - L)`` of the exact ones.
"""

from __future__ import annotations

import torch
from engine_cases import Call, Case, Outputs
from torch import Tensor

from fastdeq.constants import RESIDUAL_EPS
from fastdeq.ops import solve_common
from fastdeq.solution import Status
from fastdeq.solvers import Anderson, Solver, loop

EPS = RESIDUAL_EPS
# Rounding reaches the weights of Anderson acceleration magnified by the condition of its least
# squares. On two thousand fresh problems 1 was enough.
AMPLIFICATION = 3.0


def unit_of(case: Case) -> float:
    return torch.finfo(solve_common.working_dtype(*case.tensors())).eps / 2


def true_residual(case: Case, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: |f(z) - z|, |f(z)| + eps, and the value at the scale of the solve."""
    z = value.double() / case.scale()
    f = case.step(z)
    return (f - z).norm(dim=1), f.norm(dim=1) + EPS, z


def residual_history(case: Case, solver: Solver, updates: int) -> Tensor:
    """(updates + 1, B) relative residuals of the plain PyTorch loop in float64."""
    history = []

    def f(z: Tensor) -> Tensor:
        value = case.step(z)
        history.append((value - z).norm(dim=1) / (value.norm(dim=1) + EPS))
        return value

    loop.solve(
        f,
        case.initial(),
        solver,
        tol=-1.0,  # nothing is frozen
        max_iter=updates,
        anderson_mix=torch.ops.fastdeq.anderson_mix,
    )
    return torch.stack(history)


def residual_noise(case: Case, call: Call, value: Tensor) -> Tensor:
    """(B,) how far rounding can move the relative residual of an iterate near the value: by that
    of one evaluation and that of the iterate, ``rho + (1 + L) rho / (1 - L)``.

    Anderson acceleration adds differences of earlier iterates, which may be longer than the value,
    and its weights are off.
    """
    unit = unit_of(case)
    _, size, z = true_residual(case, value)
    noise = 2 * case.rounding(z, unit) / (1 - case.lipschitz())
    if isinstance(call.solver, Anderson):
        start = case.initial()
        longest = torch.maximum(start.norm(dim=1), case.step(start).norm(dim=1))
        noise = AMPLIFICATION * (noise + 2 * unit * longest)
    return noise / size


def legitimate_iterations(case: Case, call: Call, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Fewest and most iterations (B,) to the tolerance that rounding can account for; equal where
    the exact residual falls from above ``tol + noise`` to below ``tol - noise`` at once."""
    history = residual_history(case, call.solver, call.max_iter)

    def first_below(limit: Tensor) -> Tensor:
        below = history <= limit
        below[-1] = True
        return below.int().argmax(0)

    return first_below(call.tol + noise), first_below(call.tol - noise)


def check_agreement(case: Case, call: Call, actual: Outputs, expected: Outputs) -> None:
    """Both converged, in as many iterations as rounding allows, to values that close."""
    dtype = solve_common.working_dtype(*case.tensors())
    assert actual.value.dtype == expected.value.dtype
    assert actual.residual.dtype == dtype
    assert actual.value.is_contiguous()
    assert actual.rejects.shape == expected.rejects.shape
    check_distance(case, actual, expected)
    noise = residual_noise(case, call, expected.value)
    clear = noise < call.tol  # elsewhere the tolerance is below the rounding floor
    assert clear.sum() >= len(clear) / 2 - 1
    fewest, most = legitimate_iterations(case, call, noise)
    for outputs in (actual, expected):
        assert (outputs.status == Status.CONVERGED)[clear].all()
        assert (outputs.residual <= call.tol)[clear].all()
        within = (fewest <= outputs.iterations) & (outputs.iterations <= most)
        assert within[clear].all(), (fewest, outputs.iterations, most)
    if dtype == torch.float64:
        assert torch.equal(actual.iterations[clear], expected.iterations[clear])
        assert torch.equal(actual.rejects[clear], expected.rejects[clear])


def check_distance(case: Case, actual: Outputs, expected: Outputs) -> None:
    """Values as close as their reported residuals and the rounding of values and maps allow."""
    unit, out = unit_of(case), torch.finfo(actual.value.dtype).eps / 2
    bound = torch.zeros(len(actual.value), dtype=torch.float64)
    for outputs in (actual, expected):
        _, size, z = true_residual(case, outputs.value)
        reached = outputs.residual.double() * size + case.rounding(z, unit)
        bound += reached / (1 - case.lipschitz()) + 2 * out * z.norm(dim=1)
    distance = (actual.value.double() - expected.value.double()) / case.scale()
    assert (distance.norm(dim=1) <= bound).all(), (distance.norm(dim=1) / bound).max()
