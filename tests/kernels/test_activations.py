"""Activations, slopes and primitives in Triton against float64, over their whole range.

    |error| <= eps (r |y| + a + b |p|) + (1 + |p|) denormal,    eps = 2^-23, y the exact result

With ``r`` in units in the last place, 1 for exp, 1 for expm1, 1.4 for log1p, 3 for erf and 2 for
the division of a GPU, and half a unit for every other rounded operation:

    tanh = t / (2 + t): an error of t counts up to twice                       2 + 1/2 + 2  -> 5
    sigmoid = 1 / (1 + e) or e / (1 + e)                                   1 + 1 + 1/2 + 2  -> 5
    sigmoid' = e y^2, y = 1 / (1 + e)                        1 + 2 (1/2 + 1/2 + 2) + 1      -> 8
    softplus: log1p(e), where the error of e counts once at most            1 + 1.4 + 1/2   -> 4

Where terms cancel the error is one of the larger term: ``a`` for gelu' and silu', whose terms are
below 1.2, and for log cosh and the primitive of elu; ``b`` for gelu, p times a number below 1.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from fastdeq.kernels.activations import INDEX, activate, activation_primitive, activation_slope

from fastdeq.activations import ACTIVATIONS

KINDS = ["function", "slope", "primitive"]
BOUNDS = {  # (r, a, b)
    "function": {
        "identity": (0, 0, 0),
        "relu": (0, 0, 0),
        "leaky_relu": (1, 0, 0),
        "tanh": (5, 0, 0),
        "hardtanh": (0, 0, 0),
        "sigmoid": (5, 0, 0),
        "softplus": (4, 0, 0),
        "elu": (1, 0, 0),
        "gelu": (1, 0, 3),
        "silu": (6, 0, 0),
    },
    "slope": {
        "identity": (0, 0, 0),
        "relu": (0, 0, 0),
        "leaky_relu": (1, 0, 0),
        "tanh": (9, 0, 0),
        "hardtanh": (0, 0, 0),
        "sigmoid": (8, 0, 0),
        "softplus": (5, 0, 0),
        "elu": (2, 0, 0),
        "gelu": (0, 6, 0),
        "silu": (0, 6, 0),
    },
    "primitive": {
        "identity": (1, 0, 0),
        "relu": (1, 0, 0),
        "leaky_relu": (2, 0, 0),
        "tanh": (1, 3, 1),
        "hardtanh": (2, 0, 0),
        "sigmoid": (4, 0, 0),
        "softplus": (6, 0, 0),
        "elu": (2, 2, 1),
    },
}
CASES = [(kind, name) for kind in KINDS for name in BOUNDS[kind]]


@triton.jit
def elementwise_kernel(
    p_ptr, y_ptr, count, ACTIVATION: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(p_ptr + entry, mask=entry < count, other=0.0)
    if KIND == 0:
        y = activate(p, ACTIVATION)
    elif KIND == 1:
        y = activation_slope(p, ACTIVATION)
    else:
        y = activation_primitive(p, ACTIVATION)
    tl.store(y_ptr + entry, y, mask=entry < count)


def run(p, kind, name):
    y = torch.full_like(p, math.nan)
    block = 1024 if p.is_cuda else 1 << 16
    grid = (triton.cdiv(p.numel(), block),)
    elementwise_kernel[grid](p, y, p.numel(), INDEX[name], KINDS.index(kind), block)
    return y


def exact(p, kind, name):
    """In float64; other formulas where those of fastdeq.activations cancel."""
    p = p.double()
    if (kind, name) == ("slope", "tanh"):
        return 1 / torch.cosh(p) ** 2
    if (kind, name) == ("slope", "sigmoid"):
        return torch.sigmoid(p) * torch.sigmoid(-p)
    if (kind, name) == ("slope", "silu"):
        return torch.sigmoid(p) + p * torch.sigmoid(p) * torch.sigmoid(-p)
    return getattr(ACTIVATIONS[name], kind)(p)


def excess(y, p, kind, name, eps):
    """The largest error in multiples of its bound; infinite where a NaN is wrong."""
    truth = exact(p, kind, name)
    r, a, b = BOUNDS[kind][name]
    size = p.double().abs()
    denormal = torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    bound = eps * (r * truth.abs() + a + b * size) + (1 + size) * denormal
    return ((y.double() - truth).abs() / bound).nan_to_num(nan=math.inf).max().item()


def inputs(dtype, largest):
    magnitude = 10 ** (torch.rand(1 << 15, dtype=torch.float64) * (largest + 40) - 40)
    range_of_exp = torch.rand(1 << 15, dtype=torch.float64) * 240 - 120
    near_zero = torch.randn(1 << 15, dtype=torch.float64) * 3
    edges = torch.tensor([0.0, 1.0, 20.0, 104.0], dtype=dtype).double()
    edges = torch.cat([edges, edges.to(dtype).nextafter(torch.tensor(math.inf, dtype=dtype))])
    return torch.cat([magnitude, -magnitude, range_of_exp, near_zero, edges, -edges]).to(dtype)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_errors_are_within_their_bounds(device, kind, name):
    p = inputs(torch.float32, largest=18 if kind == "primitive" else 38).to(device)
    assert excess(run(p, kind, name), p, kind, name, 2.0**-23) <= 1


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_float64_works_as_well(device, kind, name):
    p = inputs(torch.float64, largest=100).clamp(-300, 300).to(device)
    # The exact values are no better than these.
    assert excess(run(p, kind, name), p, kind, name, 2 * 2.0**-52) <= 1


PLANTED = {
    ("function", "tanh"): lambda p: 1 - 2 / (1 + (2 * p).clamp(max=80).exp()),
    ("function", "sigmoid"): lambda p: 1 - 1 / (1 + p.clamp(max=80).exp()),
    ("function", "softplus"): lambda p: torch.where(p > 20, p, (1 + p.clamp(max=20).exp()).log()),
    ("function", "elu"): lambda p: torch.where(p > 0, p, p.exp() - 1),
    ("function", "gelu"): lambda p: torch.nn.functional.gelu(p, approximate="tanh"),
    ("function", "leaky_relu"): lambda p: torch.where(p > 0, p, p * 0.010000002),
    ("slope", "tanh"): lambda p: 1 - torch.tanh(p) ** 2,
    ("slope", "silu"): lambda p: torch.sigmoid(p) * (1 + p * torch.sigmoid(-p) * (1 + 1e-5)),
    ("primitive", "tanh"): lambda p: torch.log(torch.cosh(p.clamp(-80, 80))),
    ("primitive", "softplus"): lambda p: (
        ACTIVATIONS["softplus"].primitive(p.double()).float() * (1 + 1e-6)
    ),
}


@pytest.mark.parametrize(("kind", "name"), PLANTED)
def test_the_bounds_see_a_planted_approximation(kind, name):
    p = inputs(torch.float32, largest=18)
    assert excess(PLANTED[kind, name](p), p, kind, name, 2.0**-23) > 1


INF, NAN = math.inf, math.nan
LIMITS = {  # phi(inf), phi(-inf), phi'(inf), phi'(-inf); inf times 0 is NaN
    "identity": (INF, -INF, 1, 1),
    "relu": (INF, 0, 1, 0),
    "leaky_relu": (INF, -INF, 1, 0.01),
    "tanh": (1, -1, 0, 0),
    "hardtanh": (1, -1, 0, 0),
    "sigmoid": (1, 0, 0, 0),
    "softplus": (INF, 0, 1, 0),
    "elu": (INF, -1, 1, 0),
    "gelu": (INF, NAN, NAN, NAN),
    "silu": (INF, NAN, NAN, NAN),
}
COMPARISONS = ("identity", "relu", "leaky_relu", "hardtanh")


@pytest.mark.parametrize("name", INDEX)
def test_infinity_gives_the_limits_and_nan_stays(device, name):
    p = torch.tensor([INF, -INF, NAN], device=device)
    value, slope = run(p, "function", name).tolist(), run(p, "slope", name).tolist()
    assert value[:2] + slope[:2] == pytest.approx(LIMITS[name], nan_ok=True)
    assert math.isnan(value[2])
    assert math.isnan(slope[2]) == (name not in COMPARISONS)


def test_the_order_is_that_of_the_table():
    assert list(INDEX) == list(ACTIVATIONS)
    assert list(INDEX.values()) == list(range(len(INDEX)))
