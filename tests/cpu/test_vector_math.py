"""The engine's vector functions, by way of its activations, against exact values."""

import engine_vector_bounds as bounds
import numpy as np
import pytest
import torch

from fastdeq.activations import ACTIVATIONS
from fastdeq.backends import extension

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)
COUNT = {np.float32: 1 << 20, np.float64: 1 << 14}
needs_long_double = pytest.mark.skipif(
    not bounds.wide_enough, reason="long double is no wider than double here"
)
DTYPES = [np.float32, pytest.param(np.float64, marks=needs_long_double)]


def activate(x, name, derivative):
    return torch.ops.fastdeq.engine_activation(x, name, derivative)


def worst(function, name, derivative, dtype):
    generator = np.random.default_rng(torch.randint(1 << 31, ()).item())
    avx512 = extension.build_info["engine"].startswith("avx512")
    return bounds.worst_excess(
        function, name, derivative, dtype, generator, count=COUNT[dtype], avx512=avx512
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("derivative", [0, 1])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_errors_are_within_the_stated_bounds(name, derivative, dtype):
    assert worst(activate, name, derivative, dtype) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values_and_lengths(dtype):
    bounds.check_special_values(activate, dtype)


def pade(x, name, derivative):
    """tanh to six digits for small x."""
    x = x.double().clamp(-4.97, 4.97).to(x.dtype)
    return (
        x
        * (135135 + x**2 * (17325 + x**2 * (378 + x**2)))
        / (135135 + x**2 * (62370 + x**2 * (3150 + 28 * x**2)))
    )


PLANTED = {
    "tanh": pade,
    "sigmoid": lambda x, *_: 1 - 1 / (1 + x.exp()),  # cancels for small values
    "elu": lambda x, *_: torch.where(x > 0, x, x.exp() - 1),
    "softplus": lambda x, *_: torch.where(x > 20, x, (1 + x.exp()).log()),
    "gelu": lambda x, *_: torch.nn.functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLANTED)
def test_the_bounds_see_a_planted_approximation(name, dtype):
    with np.errstate(all="ignore"):
        assert worst(PLANTED[name], name, 0, dtype) > 2


def test_only_floating_point_is_supported():
    with pytest.raises(RuntimeError, match="floating-point"):
        activate(torch.ones(3, dtype=torch.int32), "tanh", 0)
    with pytest.raises(RuntimeError, match="unknown activation"):
        activate(torch.ones(3), "tan", 0)


def test_strided_input():
    x = torch.randn(6, 9)
    assert torch.equal(activate(x.t(), "gelu", 0), activate(x, "gelu", 0).t())
