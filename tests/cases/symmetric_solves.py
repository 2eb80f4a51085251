"""Whole solves through the kernels of the symmetric solvers, and what they did on the way.

Problems and outputs are those of engine_cases.py. Memory that a solve allocates is full of NaN.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from engine_cases import Call, Outputs
from fastdeq.kernels.activations import INDEX
from fastdeq.kernels.steps import engine, sample
from torch import Tensor

from fastdeq.activations import ACTIVATIONS
from fastdeq.solvers import SOLVERS


def column(name: str) -> int:
    return getattr(sample, name).value


class Seen(NamedTuple):
    """After evaluation k: MODE, REQUESTED and EVALUATED of each sample, and rows asked for."""

    mode: Tensor
    requested: Tensor
    evaluated: Tensor
    rows: Tensor | None


class Recorder:
    """Watches the steps of a solver; ``after(k, steps)``, if given, may tamper with them."""

    def __init__(self, steps, after=None, row=None):
        self.steps, self.after, self.row, self.seen = steps, after, row, []

    def __getattr__(self, name):
        return getattr(self.steps, name)

    def advance(self, k):
        self.steps.advance(k)
        if self.after is not None:
            self.after(k, self.steps)
        flags = self.steps.samples.flags.cpu().clone()
        rows = None if self.row is None else self.steps.work[self.row].cpu().clone()
        kinds = (flags[:, column(n)] for n in ("MODE", "REQUESTED", "EVALUATED"))
        self.seen.append(Seen(*kinds, rows))


@contextlib.contextmanager
def poisoned():
    """Uninitialised memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def stand_in(samples, weight, low_weight, point, value, residual, activation, *, at_zero, product):
    """What steps/affine_step.py does, in PyTorch; LOW rows do not wait for their tile."""
    del residual, product
    requested = samples.flags[:, column("REQUESTED")]
    runs, rounded, direct = (
        rows.unsqueeze(1)
        for rows in (
            requested != sample.STOPPED.value,
            requested == sample.LOW.value,
            requested == sample.PRODUCT.value,
        )
    )
    product = torch.zeros_like(point) if at_zero else point @ weight.t()
    pre = product + samples.offset
    if low_weight is not None:
        change = samples.change.float() @ low_weight.float().t()
        pre = torch.where(rounded, samples.pre + change, pre)
    if samples.slope is not None:
        result = samples.slope * pre
    else:
        phi = next(name for name, index in INDEX.items() if index == activation)
        result = ACTIVATIONS[phi].function(pre)
    iterates = runs & ~direct
    norms = torch.stack([torch.linalg.vector_norm(r, dim=1) for r in (result - point, result)], 1)
    tiles = torch.arange(samples.sums.shape[1], device=point.device).view(1, -1, 1)
    spread = torch.where(tiles == 0, norms.unsqueeze(1), 0.0)
    samples.sums.copy_(torch.where(iterates.unsqueeze(2), spread, samples.sums))
    samples.pre.copy_(torch.where(iterates, pre, samples.pre))
    value.copy_(torch.where(runs, torch.where(direct, product, result), value))
    evaluated = samples.flags[:, column("EVALUATED")]
    evaluated.copy_(torch.where(runs.squeeze(1), requested, evaluated))


def run(case, call: Call, device: str, monkeypatch, *, after=None, row=None, step=stand_in):
    """The outputs of a case of engine_cases.py, and what a Recorder saw. Evaluations are made by
    ``step``, None for the kernel of affine_step.py."""
    options, recorders = call.options(), []
    kind = engine.SOLVER_STEPS[options.solver]

    class Recorded(kind):
        def __new__(cls, *arguments):
            recorders.append(Recorder(kind(*arguments), after, row))
            return recorders[-1]

    with monkeypatch.context() as patch, poisoned():
        patch.setitem(engine.SOLVER_STEPS, options.solver, Recorded)
        if step is not None:
            patch.setattr(engine.step, "affine_step", step)
        tensors = [t.to(device) for t in case.tensors()]
        if SOLVERS[options.solver].linear:
            outputs = engine.solve_affine_adjoint(*tensors, options)
        else:
            w, c, *start = tensors
            start = start[0] if start else None
            outputs = engine.solve_affine(w, c, start, case.activation, True, options)
    return Outputs(*(t.cpu() for t in outputs)), recorders[0].seen


# Modes of fastdeq/solvers/{energy,minres}.py as sample.py names them.
MODES = ("MOMENTUM", "OPEN", "DIRECTION", "TRIAL")


def reference_modes(case, call: Call):
    """The outputs of the reference, and the mode of each sample after each of its steps."""
    kind, seen = type(call.solver), []

    class Watched(kind):
        def step(self, state, *rest):
            answer = super().step(state, *rest)
            seen.append(torch.tensor([column(MODES[m]) for m in state.mode.tolist()]))
            return answer

    name = call.solver.name
    before = SOLVERS[name]
    SOLVERS[name] = Watched
    try:
        outputs = case.reference(call)
    finally:
        SOLVERS[name] = before
    return outputs, seen


def first_differences(case, call: Call, device: str, monkeypatch, **options):
    """The outputs, and for each sample the first k after which it is in another mode, or requests
    another kind of evaluation, than in the reference; the number of its iterations where there
    is none. The reference is taken in float32 or in float64, whichever it follows longer:
    where these two part, a decision was close."""
    outputs, seen = run(case, call, device, monkeypatch, **options)
    longest = torch.zeros_like(outputs.iterations)
    for problem in (case, case.double()):
        expected, modes = reference_modes(problem, call)
        follows, length = torch.ones_like(longest, dtype=torch.bool), torch.zeros_like(longest)
        for k, (one, other) in enumerate(zip(seen, modes, strict=False)):
            products = one.mode == column("DIRECTION")
            alike = (one.mode == other) & ((one.requested == sample.PRODUCT.value) == products)
            goes_on = (k < outputs.iterations) & (k < expected.iterations)
            follows = follows & alike & goes_on
            length += follows
        longest = torch.maximum(longest, length)
    return outputs, longest
