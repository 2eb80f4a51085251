"""One evaluation of an affine cell, what it should give, and how far it may be from that.

All outputs start as NaN and EVALUATED as -1: what is written and what is not are both seen. With
u = 2^-24 and S = |rows| |M|^T, a float32 sum of n + 1 terms is off by (n + 2) u S at most where
sums are rounded, twice that where a tensor core truncates; "tf32x3" adds 2^-19 S. An error of the
pre-activation counts with the Lipschitz constant of phi (below 1.2) or the slope; phi itself is off
by less than 16 u max(1, |phi|), see test_activations.py.
"""

from __future__ import annotations

import math

import torch
from fastdeq.kernels.activations import INDEX
from fastdeq.kernels.launch import product_precision
from fastdeq.kernels.steps import sample
from fastdeq.kernels.steps.affine_step import affine_step
from fastdeq.kernels.steps.affine_tile import SUMS_COLUMNS, sums_of
from fastdeq.kernels.steps.sample import Samples

from fastdeq.activations import ACTIVATIONS

STOPPED, FULL, LOW, PRODUCT = (
    c.value for c in (sample.STOPPED, sample.FULL, sample.LOW, sample.PRODUCT)
)
REQUESTED, EVALUATED, HISTORY = (
    c.value for c in (sample.REQUESTED, sample.EVALUATED, sample.HISTORY)
)
UNIT = 2.0**-24
SLOTS, SLOT = 3, 1  # value and residual are slot 1 of 3


class Step:
    """B rows of size n. ``weight`` is M of ``point @ M.T``; an adjoint has no ``activation``."""

    def __init__(self, device, batch, size, activation="tanh", requested=FULL, schedule=False):
        self.activation, self.schedule = activation, schedule
        self.weight = (torch.randn(size, size) / size**0.5).to(device)
        self.low_weight = self.weight.bfloat16()
        self.point = torch.randn(batch, size).to(device)
        self.values = torch.full((batch, SLOTS, size), math.nan, device=device)
        self.residuals = torch.full_like(self.values, math.nan)
        flags = torch.full((batch, sample.FLAGS.value), 77, dtype=torch.int32)
        flags[:, EVALUATED], flags[:, HISTORY] = -1, torch.arange(batch) % 3 != 1
        flags[:, REQUESTED] = torch.as_tensor(requested)
        pre = torch.randn(batch, size) if schedule else torch.full((batch, size), math.nan)
        self.samples = Samples(
            points=torch.empty(0),
            pre=pre.to(device),
            sums=torch.full((batch, sums_of(size), 2), math.nan).to(device),
            numbers=torch.empty(0),
            flags=flags.to(device),
            remaining=torch.empty(0),
            offset=torch.randn(batch, size).to(device),
            slope=None if activation else torch.rand(batch, size).to(device),
            change=torch.randn(batch, size).bfloat16().to(device) if schedule else None,
        )

    def arguments(self):
        return {
            "point": self.point,
            "value": self.values[:, SLOT],
            "residual": self.residuals[:, SLOT],
            "activation": INDEX[self.activation] if self.activation else None,
        }

    def run(self, **more):
        """Evaluates and returns self, with what there was before in ``before``."""
        self.before = self.state()
        low_weight = self.low_weight if self.schedule else None
        affine_step(self.samples, self.weight, low_weight, **self.arguments(), **more)
        return self

    def state(self):
        samples = self.samples
        tensors = {"values": self.values, "residuals": self.residuals, "pre": samples.pre}
        tensors |= {"sums": samples.sums, "flags": samples.flags}
        return {name: t.clone().cpu() for name, t in tensors.items()}


def _product(rows, weight):
    rows, weight = rows.cpu().double(), weight.cpu().double()
    return rows @ weight.t(), rows.abs() @ weight.abs().t()


def expected_pre(step, kinds, at_zero=False):
    """(product, pre, the largest error of either), each (B, n) float64."""
    samples, size = step.samples, step.point.shape[1]
    product, scale = _product(step.point, step.weight)
    if at_zero:
        product, scale = torch.zeros_like(product), torch.zeros_like(scale)
    base = samples.offset.cpu().double()
    precise = 2 * (size + 2) * UNIT * scale
    if product_precision(step.point) == "tf32x3":
        precise += 2.0**-19 * scale
    if step.schedule:
        is_low = (torch.as_tensor(kinds) == LOW)[:, None]
        low, low_scale = _product(samples.change, step.low_weight)
        product = torch.where(is_low, low, product)
        base = torch.where(is_low, step.before["pre"].double(), base)
        precise = torch.where(is_low, 2 * (size + 2) * UNIT * low_scale, precise)
    pre = base + product
    return product, pre, precise + UNIT * (product.abs() + base.abs())


def check(step, kinds, at_zero=False):
    """Everything that is to be written, and that nothing else was; ``kinds`` as in the flags."""
    kinds = torch.as_tensor(kinds).expand(len(step.point))
    product, pre, error = expected_pre(step, kinds.tolist(), at_zero)
    if step.activation:
        value = ACTIVATIONS[step.activation].function(pre)
        value_error = 1.2 * error + 16 * UNIT * value.abs().clamp(min=1)
    else:
        slope = step.samples.slope.cpu().double()
        value, value_error = slope * pre, slope * error + UNIT * (slope * pre).abs()
    is_product = kinds == PRODUCT
    value = torch.where(is_product[:, None], product, value)
    value_error = torch.where(is_product[:, None], error, value_error)
    after, before = step.state(), step.before

    evaluated = (kinds == FULL) | (kinds == LOW)
    kept = evaluated & (before["flags"][:, HISTORY] != 0)
    _check_rows("value", after["values"][:, SLOT], value, value_error, kinds != STOPPED)
    _check_rows("pre", after["pre"], pre, error, evaluated)
    point = torch.zeros_like(value) if at_zero else step.point.cpu().double()
    found = after["values"][:, SLOT].double()
    g = found - point
    _check_rows("residual", after["residuals"][:, SLOT], g, 2 * UNIT * g.abs(), kept)
    # Norms of the values found; a square has a relative error of 3 u, a sum of 32 of them one of
    # 32 u, its root half of that and 2 u more.
    sums = torch.stack([_sums(g), _sums(found)], dim=2)
    _check_rows("sums", after["sums"], sums, 22 * UNIT * sums, evaluated)

    untouched = {"pre": ~evaluated, "sums": ~evaluated}
    for name, rows in untouched.items():
        _same(name, after[name][rows], before[name][rows])
    _same("value", after["values"][kinds == STOPPED], before["values"][kinds == STOPPED])
    _same("residual", after["residuals"][~kept], before["residuals"][~kept])
    others = [s for s in range(SLOTS) if s != SLOT]
    for name in ("values", "residuals"):
        _same(f"other slots of {name}", after[name][:, others], before[name][:, others])
    flags = before["flags"].clone()
    flags[kinds != STOPPED, EVALUATED] = kinds[kinds != STOPPED].to(torch.int32)
    _same("flags", after["flags"], flags)


def _sums(x):
    padded = torch.nn.functional.pad(x * x, (0, -x.shape[1] % SUMS_COLUMNS.value))
    return padded.unflatten(1, (-1, SUMS_COLUMNS.value)).sum(2).sqrt()


def _check_rows(name, actual, expected, bound, rows):
    wrong = ((actual.double() - expected).abs() <= bound) == 0  # also for NaN
    wrong &= actual.isnan().ne(expected.isnan()) | expected.isnan().logical_not()
    wrong = wrong[rows]
    assert not wrong.any(), f"{name}: {int(wrong.sum())} entries above the bound"


def _same(name, actual, expected):
    assert torch.equal(actual.nan_to_num(nan=-7e30), expected.nan_to_num(nan=-7e30)), (
        f"{name} was written where it was not to be"
    )
