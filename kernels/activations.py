"""The activations of fastdeq/activations.py as Triton functions: phi, its slope and its primitive.

Symbols: p the pre-activation, a tile of any shape in float32 or float64; ``ACTIVATION`` an index of
``INDEX``, known when a kernel is compiled, so that no branch is left in it. Nothing here loads or
stores: a kernel calls these functions on values in its registers.

    ``e = exp(-|p|)``,  ``sigmoid = 1 / (1 + e)`` or ``e / (1 + e)``,  ``sigmoid' = e / (1 + e)^2``
    ``t = expm1(-2 |p|)``,  ``|tanh| = -t / (2 + t)``,  ``tanh' = 4 e^2 / (1 + e^2)^2``
    ``softplus = max(p, 0) + log1p(e)``

Only e^x and expm1(x) with x <= 0 and log1p(x) with 0 <= x <= 1 are needed. So nothing overflows,
and no digits are lost next to zero or in the tails. ``tl.exp`` alone would not do: in float32 the
hardware computes 2^y with the rounded y = x / ln 2, so the relative error grows as |x|, and log1p
and expm1 do not exist. The polynomials are those of csrc/cpu/vector_math.h and vector_special.h. In
float64, where ``tl.exp`` and ``tl.log`` are good, W. Kahan's quotients are enough.

NaN gives NaN (a slope that is a comparison gives what the comparison with NaN does). At +-inf the
results are the limits, but NaN where the formula has inf times 0, as in PyTorch: gelu and silu at
-inf, their slopes at both. Denormal results are not flushed.

Operations per element in float32: about 25 for tanh and sigmoid, one of them a division; 40 for
softplus. Compared with float64 by Triton's interpreter; tests/kernels/test_activations.py has the
errors.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The order of csrc/common/activation_names.h.
IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
TANH = tl.constexpr(3)
HARDTANH = tl.constexpr(4)
SIGMOID = tl.constexpr(5)
SOFTPLUS = tl.constexpr(6)
ELU = tl.constexpr(7)
GELU = tl.constexpr(8)
SILU = tl.constexpr(9)
INDEX: dict[str, int] = {
    "identity": IDENTITY.value,
    "relu": RELU.value,
    "leaky_relu": LEAKY_RELU.value,
    "tanh": TANH.value,
    "hardtanh": HARDTANH.value,
    "sigmoid": SIGMOID.value,
    "softplus": SOFTPLUS.value,
    "elu": ELU.value,
    "gelu": GELU.value,
    "silu": SILU.value,
}

LN2 = tl.constexpr(0.69314718055994530942)
LN2_HIGH = tl.constexpr(0.693145751953125)  # 15 bits: its products with an exponent are exact
LN2_LOW = tl.constexpr(1.428606765330187e-06)
LOG2_E = tl.constexpr(1.44269504088896341)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer in the low bits
ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _reduce(x):
    """Integer n and r with x = n ln2 + r and |r| <= ln2 / 2."""
    rounded = x * LOG2_E + ROUND
    n = rounded - ROUND
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    return rounded.to(tl.int32, bitcast=True) - ROUND_BITS, r


@triton.jit
def _expm1_reduced(r):
    """expm1(r) for |r| <= 0.347, relative error 2^-26."""
    square = r * r
    low = r * 0.16666539013385773 + 0.4999999701976776
    high = square * 0.0013839015737175941 + (r * 0.008367069996893406 + 0.041667744517326355)
    return square * (square * high + low) + r


@triton.jit
def exp_nonpositive(x):
    """e^x for x <= 0."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        n, r = _reduce(tl.where(x < -104.0, -104.0, x))
        # 2^n in two factors: n may be below the smallest exponent of a normal number.
        both = n + 254
        half = both >> 1
        first = (half << 23).to(tl.float32, bitcast=True)
        second = ((both - half) << 23).to(tl.float32, bitcast=True)
        y = (_expm1_reduced(r) + 1.0) * first * second
    return y


@triton.jit
def expm1_nonpositive(x):
    """e^x - 1 for x <= 0."""
    if x.dtype == tl.float64:
        u = tl.exp(x)
        quotient = (u - 1.0) * (x / tl.log(tl.where((u > 0) & (u < 1), u, 0.5)))
        y = tl.where(x < -40.0, -1.0, tl.where(u == 1.0, x, quotient))
    else:
        n, r = _reduce(tl.where(x < -18.0, -18.0, x))
        power = ((n + 127) << 23).to(tl.float32, bitcast=True)
        y = power * _expm1_reduced(r) + (power - 1.0)
    return y


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1."""
    if x.dtype == tl.float64:
        u = x + 1.0
        quotient = tl.log(u) * (x / tl.where(u > 1.0, u - 1.0, 1.0))
        y = tl.where(u == 1.0, x, quotient)
    else:
        # 1 + x = 2^k (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); 2 atanh(s) = log(1 + f).
        above = x > 0.41421356
        f = tl.where(above, 0.5 * x - 0.5, x)
        s = f / (f + 2.0)
        z = s * s
        half_square = 0.5 * f * f
        tail = z * (z * 0.2987212836742401 + 0.39977553486824036) + 0.6666677594184875
        tail = z * tail
        tail = s * (half_square + tail) + tl.where(above, LN2_LOW, 0.0)
        y = tl.where(above, LN2_HIGH, 0.0) - ((half_square - tail) - f)
    return y


@triton.jit
def _sigmoid(p):
    e = exp_nonpositive(-tl.abs(p))
    return tl.where(p < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _sigmoid_slope(p):
    e = exp_nonpositive(-tl.abs(p))
    y = 1.0 / (1.0 + e)
    return e * y * y


@triton.jit
def _tanh(p):
    t = expm1_nonpositive(-2.0 * tl.abs(p))
    y = t / (2.0 + t)
    return tl.where(p < 0, y, -y)


@triton.jit
def _softplus(p):
    return tl.where(p < 0, 0.0, p) + log1p_unit(exp_nonpositive(-tl.abs(p)))


@triton.jit
def _gelu_cdf(p):
    return 0.5 * (1.0 + tl.erf(p * 0.70710678118654752440))


@triton.jit
def activate(p, ACTIVATION: tl.constexpr):
    """phi(p)."""
    if ACTIVATION == IDENTITY:
        y = p
    elif ACTIVATION == RELU:
        y = tl.where(p < 0, 0.0, p)
    elif ACTIVATION == LEAKY_RELU:
        y = tl.where(p < 0, p * 0.01, p)
    elif ACTIVATION == TANH:
        y = _tanh(p)
    elif ACTIVATION == HARDTANH:
        y = tl.where(p > 1, 1.0, tl.where(p < -1, -1.0, p))
    elif ACTIVATION == SIGMOID:
        y = _sigmoid(p)
    elif ACTIVATION == SOFTPLUS:
        y = tl.where(p > 20, p, _softplus(p))
    elif ACTIVATION == ELU:
        y = tl.where(p > 0, p, expm1_nonpositive(tl.where(p > 0, 0.0, p)))
    elif ACTIVATION == GELU:
        y = p * _gelu_cdf(p)
    else:
        tl.static_assert(ACTIVATION == SILU, "unknown activation")
        y = p * _sigmoid(p)
    return y


@triton.jit
def activation_slope(p, ACTIVATION: tl.constexpr):
    """phi'(p)."""
    zero = tl.zeros_like(p)
    if ACTIVATION == IDENTITY:
        y = zero + 1.0
    elif ACTIVATION == RELU:
        y = tl.where(p > 0, zero + 1.0, zero)
    elif ACTIVATION == LEAKY_RELU:
        y = tl.where(p > 0, zero + 1.0, zero + 0.01)
    elif ACTIVATION == TANH:
        y = 4.0 * _sigmoid_slope(2.0 * p)
    elif ACTIVATION == HARDTANH:
        y = tl.where(tl.abs(p) < 1, zero + 1.0, zero)
    elif ACTIVATION == SIGMOID:
        y = _sigmoid_slope(p)
    elif ACTIVATION == SOFTPLUS:
        y = _sigmoid(p)
    elif ACTIVATION == ELU:
        y = exp_nonpositive(tl.where(p > 0, 0.0, p))
    elif ACTIVATION == GELU:
        density = exp_nonpositive(-0.5 * p * p) * 0.39894228040143267794  # 1 / sqrt(2 pi)
        y = _gelu_cdf(p) + p * density
    else:
        tl.static_assert(ACTIVATION == SILU, "unknown activation")
        y = _sigmoid(p) + p * _sigmoid_slope(p)
    return y


@triton.jit
def activation_primitive(p, ACTIVATION: tl.constexpr):
    """The convex antiderivative of a monotone phi, as in fastdeq/activations.py."""
    tl.static_assert(ACTIVATION < GELU, "an activation that is not monotone has no primitive here")
    a = tl.abs(p)
    if ACTIVATION == TANH:  # log cosh
        y = a + log1p_unit(exp_nonpositive(-2.0 * a)) - LN2
    elif ACTIVATION == HARDTANH:
        y = tl.where(a < 1, 0.5 * p * p, a - 0.5)
    elif ACTIVATION == SIGMOID:
        y = _softplus(p)
    elif ACTIVATION == SOFTPLUS:
        # The dilogarithm, -Li2(-e^p): its series in u, with coefficients B_n / (n + 1)!.
        u = log1p_unit(exp_nonpositive(-a))
        square = u * u
        odd = square * -4.0647616451442256e-11 + 1.8978869988970999e-09
        odd = square * odd - 9.1857730746619636e-08
        odd = square * (square * odd + 4.7241118669690097e-06) - 2.7777777777777778e-04
        odd = square * odd + 2.7777777777777778e-02
        below = u + 0.25 * square + u * square * odd
        y = tl.where(p > 0, 0.5 * p * p + 1.6449340668482264365 - below, below)
    elif ACTIVATION == ELU:
        y = tl.where(p > 0, 0.5 * p * p, expm1_nonpositive(tl.where(p > 0, 0.0, p)) - p)
    else:  # identity and the piecewise linear ones
        y = 0.5 * p * activate(p, ACTIVATION)
    return y
