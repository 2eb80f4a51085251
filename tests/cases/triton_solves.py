"""Solves of engine_cases' problems in Triton, and checks of what they say."""

from __future__ import annotations

import dataclasses

import torch
from engine_cases import Call, Forward, Outputs, make_adjoint, make_forward
from engine_checks import true_residual, unit_of
from fastdeq.kernels import solve_affine as engine

from fastdeq import affine, reference
from fastdeq.activations import ACTIVATIONS
from fastdeq.solution import Status
from fastdeq.solvers import Anderson, Picard

SOLVERS = (
    Picard(),
    Picard(damping=0.7),
    Anderson(),
    Anderson(window=2, damping=0.8),
    Anderson(accelerate_above=0.7),
)
MAKERS = (make_forward, make_adjoint)
CALL = Call(Picard(), tol=1e-4, max_iter=60)


class Engine:
    """Solves one of engine_cases' problems in Triton, on the device under test."""

    def __init__(self, device):
        self.device = device

    def __call__(self, case, call, **more):
        tensors = {
            f.name: getattr(case, f.name)
            for f in dataclasses.fields(case)
            if isinstance(getattr(case, f.name), torch.Tensor)
        }
        moved = dataclasses.replace(case, **{n: t.to(self.device) for n, t in tensors.items()})
        form = engine.solve_affine if isinstance(case, Forward) else engine.solve_affine_adjoint
        outputs = [t.cpu() for t in form(*moved._arguments(call), **more)]
        if isinstance(case, Forward):
            assert outputs.pop().numel() == 0  # packed
        return Outputs(*outputs)


def plain(case, call):
    form = affine.solve_affine if isinstance(case, Forward) else affine.solve_affine_adjoint
    outputs = form(*case._arguments(call), anderson_mix=reference.anderson_mix)
    return Outputs(*outputs[:5])


def call_for(solver, **changes):
    return dataclasses.replace(CALL, solver=solver, **changes)


def check_truth(case, call, outputs):
    """The reported residual is that of the returned value, in float64, but for the rounding of one
    evaluation of the map; a sample that is said to have converged has."""
    difference, size, z = true_residual(case, outputs.value)
    exact, error = difference / size, case.rounding(z, unit_of(case)) / size
    assert ((outputs.residual - exact).abs() <= error).all()
    converged = outputs.status == Status.CONVERGED
    assert (outputs.residual <= call.tol)[converged].all()


def check_slope(case, outputs):
    """phi' at the value: its argument may be off by the rounding of W z + c, and so may phi'."""
    slope, pre = ACTIVATIONS[case.activation].slope, case.pre(outputs.value)
    error, unit = case.sum_error(outputs.value, unit_of(case)), unit_of(case)
    exact = slope(pre)
    moved = torch.maximum((slope(pre + error) - exact).abs(), (slope(pre - error) - exact).abs())
    bound = 2 * moved + 16 * unit * (1 + pre.abs())
    assert ((outputs.value_slope - exact).abs() <= bound).all()
