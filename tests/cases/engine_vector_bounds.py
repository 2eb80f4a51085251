"""How far the engine's activations may be from the exact ones, and inputs that find out.

    a ulp(y)   error of a vector function, a from the table in csrc/cpu/vector_math.h
    E          bound on an error; through y = h(x) it becomes |h'(x)| E, and every rounded operation
               adds half a unit in the last place of its result

Exact values come from the next wider type: float64, or the 80 bits of long double on x86-64.
"""

from __future__ import annotations

import numpy as np
import torch

from fastdeq.activations import ACTIVATIONS

# Largest error found, in units in the last place: AVX-512, and the larger of AVX2 and SSE2. Those
# in float on AVX-512 are exhaustive; fresh input may exceed the others by a little, SAMPLED.
TABLE = {
    (np.float32, True): {"tanh": 1.75, "exp": 1.05, "expm1": 1.60, "sigmoid": 1.53, "log1p": 1.40,
                         "erf": 2.61},
    (np.float32, False): {"tanh": 2.08, "exp": 1.04, "expm1": 1.68, "sigmoid": 1.49, "log1p": 1.38,
                          "erf": 2.53},
    (np.float64, True): {"tanh": 1.95, "exp": 1.08, "expm1": 2.16, "sigmoid": 1.49, "log1p": 1.34,
                         "erf": 2.63},
    (np.float64, False): {"tanh": 2.15, "exp": 1.08, "expm1": 2.24, "sigmoid": 1.50, "log1p": 1.35,
                          "erf": 2.74},
}  # fmt: skip
SAMPLED = 0.2
wide_enough = np.finfo(np.longdouble).nmant >= 63


def wider(dtype):
    return np.float64 if dtype == np.float32 else np.longdouble


def ulp(x, dtype):
    """Distance of the dtype's numbers around the wide number x; never below its denormals."""
    info = np.finfo(dtype)
    _, exponent = np.frexp(np.abs(x))  # |x| = m 2^exponent, 1/2 <= m < 1
    exponent = np.where(x == 0, info.minexp, np.maximum(exponent, info.minexp + 1))
    return np.ldexp(np.ones_like(x), exponent - 1 - info.nmant)


def erf(x):
    """2/sqrt(pi) e^-x^2 sum 2^n x^(2n+1)/(2n+1)!!, whose terms have one sign, in the type of x."""
    if x.dtype == np.float64:
        return torch.erf(torch.from_numpy(x)).numpy()
    y = np.clip(x, -7, 7)  # 1 - erf(7) is 4e-23
    term, total, square = y.copy(), y.copy(), y * y
    for n in range(1, 220):
        term = term * 2 * square / (2 * n + 1)
        total = total + term
    pi = 4 * np.arctan(np.ones_like(x))
    return total * np.exp(-square) * 2 / np.sqrt(pi)


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def exact_and_bound(name, derivative, p, dtype, errors):
    """The exact phi(p), or phi'(p), and the largest error allowed, for wide finite p."""

    def half(y):
        return ulp(y, dtype) / 2

    zero = np.zeros_like(p)
    if name == "identity":
        return (p if not derivative else zero + 1), zero
    if name == "relu":
        return (np.maximum(p, 0) if not derivative else (p > 0) + zero), zero
    if name == "hardtanh":
        return (np.clip(p, -1, 1) if not derivative else (np.abs(p) < 1) + zero), zero
    if name == "leaky_relu":
        factor = np.where(p > 0, zero + 1, np.longdouble("0.01").astype(p.dtype))
        y = factor if derivative else p * factor
        # 0.01 and the product are rounded.
        return y, np.where(p > 0, 0, half(y) + (0 if derivative else np.abs(p) * half(factor)))
    if name == "tanh":
        t = np.tanh(p)
        error = errors["tanh"] * ulp(t, dtype)
        if not derivative:
            return t, error
        y = 1 / np.cosh(np.clip(p, -300, 300)) ** 2
        return y, 2 * np.abs(t) * error + half(t * t) + half(y)
    if name in ("sigmoid", "silu") or (name == "softplus" and derivative):
        s, rest = sigmoid(p), sigmoid(-p)
        error = errors["sigmoid"] * ulp(s, dtype)
        rest_error = error + half(rest)
        if name == "silu" and derivative:
            inner = p * rest
            inner_error = np.abs(p) * rest_error + half(inner) + half(1 + inner)
            y = s * (1 + inner)
            return y, s * inner_error + np.abs(1 + inner) * error + half(y)
        if name == "silu":
            return p * s, np.abs(p) * error + half(p * s)
        if name == "sigmoid" and derivative:
            return s * rest, rest * error + s * rest_error + half(s * rest)
        return s, error
    if name == "softplus":  # p itself above 20, as in PyTorch
        e = np.exp(np.minimum(p, 20))
        y = np.where(p > 20, p, np.log1p(e))
        through = errors["exp"] * ulp(e, dtype) / (1 + e)
        return y, np.where(p > 20, 0, errors["log1p"] * ulp(y, dtype) + through)
    if name == "elu":
        low = np.minimum(p, 0)
        if derivative:
            y = np.exp(low)
            return y, errors["exp"] * ulp(y, dtype)
        y = np.where(p > 0, p, np.expm1(low))
        return y, np.where(p > 0, 0, errors["expm1"] * ulp(y, dtype))
    root = np.sqrt(p.dtype.type(0.5))
    x = p * root
    e = erf(x)
    erf_error = errors["erf"] * ulp(e, dtype)
    erf_error += np.exp(-x * x) * 2 / np.sqrt(np.pi) * 2 * half(x)  # 1/sqrt(2) and p times it
    cdf, cdf_error = (1 + e) / 2, (erf_error + half(1 + e)) / 2
    if not derivative:
        return p * cdf, np.abs(p) * cdf_error + half(p * cdf)
    square = np.minimum(p * p / 2, 800)
    density = np.exp(-square) / np.sqrt(p.dtype.type(2 * np.pi))
    # The rounded square moves e^-square by a factor, then exp, the constant and the product.
    density_error = density * half(square) + (errors["exp"] + 1.5) * ulp(density, dtype)
    y = cdf + p * density
    return y, cdf_error + np.abs(p) * density_error + half(p * density) + half(y)


def inputs(dtype, generator, count):
    """Random bit patterns (finite ones), dense ranges where functions change, and edges."""
    integer = np.uint32 if dtype == np.float32 else np.uint64
    bits = generator.integers(0, np.iinfo(integer).max, count, dtype=integer, endpoint=True)
    tiny, smallest = np.finfo(dtype).tiny, np.finfo(dtype).smallest_subnormal
    edges = [
        0,
        smallest,
        2 * smallest,
        tiny,
        tiny / 2,
        1e-8,
        0.5,
        1,
        2,
        3.95,
        5.95,
        9.25,
        17,
        18,
        19.25,
        20,
        37,
        38,
        87.3,
        88.7,
        89,
        103,
        104,
        709.7,
        710,
        745,
        746,
        1e4,
        np.finfo(dtype).max,
    ]
    edges = np.array([x for x in edges if x <= np.finfo(dtype).max], dtype=dtype)
    near = np.concatenate([np.nextafter(edges, dtype(0)), edges, np.nextafter(edges, dtype(100))])
    dense = [generator.uniform(-r, r, count // 8).astype(dtype) for r in (1, 5, 20, 110)]
    x = np.concatenate([bits.view(dtype), *dense, near, -near])
    return x[np.isfinite(x)]


def worst_excess(activate, name, derivative, dtype, generator, *, count, avx512=False):
    """Largest error over its bound; at most 1 where activate(x, name, derivative) is as stated."""
    errors = TABLE[dtype, avx512]
    if not (dtype == np.float32 and avx512):
        errors = {key: value + SAMPLED for key, value in errors.items()}
    x = inputs(dtype, generator, count)
    with np.errstate(all="ignore"):
        p = x.astype(wider(dtype))
        exact, bound = exact_and_bound(name, derivative, p, dtype, errors)
        actual = activate(torch.from_numpy(x), name, derivative).numpy()
        overflow = np.abs(exact) > np.finfo(dtype).max  # of p times a slope: none of these has it
        assert not overflow.any()
        error = np.abs(actual.astype(wider(dtype)) - exact)
        assert np.isfinite(actual).all()
        # 1e-3: rounding of the exact values themselves.
        return float((error / np.maximum(bound * 1.001, ulp(exact, dtype) * 1e-3)).max())


def check_special_values(activate, dtype):
    """NaN, infinities, signs of zero and every length, as PyTorch has them."""
    inf = float("inf")
    for name, phi in ACTIVATIONS.items():
        for derivative, function in ((0, phi.function), (1, phi.slope)):
            x = torch.tensor([torch.nan, 0.0, -0.0, 1e-40, -1e-40], dtype=dtype)
            actual, expected = activate(x, name, derivative), function(x)
            torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=0)
            if derivative == 0:
                assert actual[1:].signbit().tolist() == expected[1:].signbit().tolist(), name
            x = torch.tensor([inf, -inf], dtype=dtype)
            expected = function(x.double()).tolist()
            if name in ("gelu", "silu"):  # inf where PyTorch's kernels may have inf times 0
                expected = [inf, torch.nan] if derivative == 0 else [torch.nan, torch.nan]
            found = activate(x, name, derivative)
            torch.testing.assert_close(
                found, torch.tensor(expected, dtype=dtype), equal_nan=True, rtol=0, atol=0
            )
            x = torch.randn(1000, dtype=dtype)
            whole = activate(x, name, derivative)
            for length in (0, 1, 15, 17, 999):
                assert torch.equal(activate(x[:length], name, derivative), whole[:length])
