"""Solves of engine_cases' problems in Triton, and checks of what they say."""

from __future__ import annotations

import dataclasses

import torch
from engine_cases import Call, Forward, Outputs, make_adjoint, make_forward
from engine_checks import true_residual, unit_of
from fastdeq.kernels.steps import engine as steps_engine

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


def name_of(x) -> str:
    """The end of a test's name, the same in every process."""
    return getattr(x, "__name__", str(x))


class Engine:
    """Solves one of engine_cases' problems with a Triton engine, on the device under test."""

    def __init__(self, device, engine=steps_engine):
        self.device, self.engine = device, engine

    def __call__(self, case, call, *, slope=False):
        options = call.options()
        w, *tensors = (t.to(self.device) for t in case.tensors())
        if isinstance(case, Forward):
            c, *start = tensors
            start = start[0] if start else None
            outputs = self.engine.solve_affine(w, c, start, case.activation, slope, options)
        else:
            outputs = self.engine.solve_affine_adjoint(w, *tensors, options)
        return Outputs(*(t.cpu() for t in outputs))


def plain(case, call, slope=False):
    """The reference."""
    return case.reference(call, slope) if isinstance(case, Forward) else case.reference(call)


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
