"""Whole solves through the advance kernels of the symmetric solvers, and what they did on the way.

A form is called like those of engine_cases.py. Memory that a solve allocates is full of NaN.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from engine_cases import Call, Outputs
from fastdeq.kernels import sample, solve_affine
from fastdeq.kernels.activations import INDEX
from torch import Tensor

from fastdeq import affine
from fastdeq.activations import ACTIVATIONS
from fastdeq.solvers import SOLVERS


def column(name: str) -> int:
    return getattr(sample, name).value


class Seen(NamedTuple):
    """After evaluation k: MODE and WANTED of each sample, MADE, and rows that were asked for."""

    mode: Tensor
    wanted: Tensor
    made: Tensor
    rows: Tensor | None


class Recorder:
    """Watches a method; ``after(k, method)``, if given, may tamper with it."""

    def __init__(self, method, after=None, row=None):
        self.method, self.after, self.row, self.seen = method, after, row, []

    def __getattr__(self, name):
        return getattr(self.method, name)

    def advance(self, k):
        self.method.advance(k)
        if self.after is not None:
            self.after(k, self.method)
        flags = self.method.samples.flags.cpu().clone()
        rows = None if self.row is None else self.method.work[self.row].cpu().clone()
        self.seen.append(Seen(*(flags[:, column(n)] for n in ("MODE", "WANTED", "MADE")), rows))


@contextlib.contextmanager
def poisoned():
    """Uninitialised memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def stand_in(samples, weight, narrow, point, value, residual, activation, at_zero):
    """What kernels/affine_step.py does, in PyTorch; narrow rows do not wait for their tile."""
    del residual
    wanted = samples.flags[:, column("WANTED")]
    runs, rounded, direct = (
        rows.unsqueeze(1)
        for rows in (
            wanted != sample.STOPPED.value,
            wanted == sample.NARROW.value,
            wanted == sample.PRODUCT.value,
        )
    )
    product = torch.zeros_like(point) if at_zero else point @ weight.t()
    pre = product + samples.offset
    if narrow is not None:
        change = samples.change.float() @ narrow.float().t()
        pre = torch.where(rounded, samples.pre + change, pre)
    if samples.slope is not None:
        result = samples.slope * pre
    else:
        phi = next(name for name, index in INDEX.items() if index == activation)
        result = ACTIVATIONS[phi].function(pre)
    iterates = runs & ~direct
    squares = torch.stack([(result - point).square().sum(1), result.square().sum(1)], 1)
    tiles = torch.arange(samples.sums.shape[1], device=point.device).view(1, -1, 1)
    spread = torch.where(tiles == 0, squares.unsqueeze(1), 0.0)
    samples.sums.copy_(torch.where(iterates.unsqueeze(2), spread, samples.sums))
    samples.pre.copy_(torch.where(iterates, pre, samples.pre))
    value.copy_(torch.where(runs, torch.where(direct, product, result), value))
    made = samples.flags[:, column("MADE")]
    made.copy_(torch.where(runs.squeeze(1), wanted, made))


def run(case, call: Call, device: str, monkeypatch, *, after=None, row=None, step=stand_in):
    """The outputs of a case of engine_cases.py, and what a Recorder saw. Evaluations are made by
    ``step``, None for the kernel of affine_step.py."""
    name, options = affine.encode(call.solver)
    entry, made = solve_affine.METHODS[name], []

    def make(problem):
        made.append(Recorder(entry.make(problem), after, row))
        return made[-1]

    with monkeypatch.context() as patch, poisoned():
        patch.setitem(solve_affine.METHODS, name, entry._replace(make=make))
        if step is not None:
            patch.setattr(solve_affine.step, "affine_step", step)
        tensors = [t.to(device) for t in case.tensors()]
        common = (name, options, call.tol, call.max_iter, call.precision)
        if SOLVERS[name].linear:
            outputs = solve_affine.solve_affine_adjoint(*tensors, *common)
        else:
            w, c, *start = tensors
            start = start[0] if start else None
            outputs = solve_affine.solve_affine(w, c, start, case.activation, *common, True)[:6]
    return Outputs(*(t.cpu() for t in outputs)), made[0].seen


# Modes of fastdeq/solvers/{energy,minres}.py in the terms of sample.py.
MODES = ("MOMENTUM", "OPEN", "DIRECTION", "TRIAL")


def reference_modes(case, call: Call):
    """The outputs of the reference form, and the mode of each sample after each of its steps."""
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
    """The outputs, and for each sample the first k after which it is in another mode, or wants
    another kind of evaluation, than in the reference form; the number of its iterations where there
    is none. The reference form is taken in float32 or in float64, whichever it follows longer:
    where these two part, a decision was close."""
    outputs, seen = run(case, call, device, monkeypatch, **options)
    longest = torch.zeros_like(outputs.iterations)
    for form in (case, case.double()):
        expected, modes = reference_modes(form, call)
        follows, length = torch.ones_like(longest, dtype=torch.bool), torch.zeros_like(longest)
        for k, (one, other) in enumerate(zip(seen, modes, strict=False)):
            products = one.mode == column("DIRECTION")
            alike = (one.mode == other) & ((one.wanted == sample.PRODUCT.value) == products)
            goes_on = (k < outputs.iterations) & (k < expected.iterations)
            follows = follows & alike & goes_on
            length += follows
        longest = torch.maximum(longest, length)
    return outputs, longest
