"""The random-matrix predictions against fastdeq's own weights and its own solver."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastdeq import AffineCell, Dense, DEQLayer, Orthogonal, Symmetric, theory

WEIGHTS = {"dense": Dense, "orthogonal": Orthogonal, "symmetric": Symmetric}
MOMENTS = {1: theory.variance, 2: theory.fourth_moment}
FEATURES, SCALE, DRAWS = 700, 0.6, 4


def tolerance(power: int, features: int = FEATURES, scale: float = SCALE) -> float:
    """Relative deviation of m_p at finite d that must be allowed.

    For Haar orthogonal Q, tr Q^k has variance k, so m_1 = (1/d) sum_i 1/|1 - s e^(i t_i)|^2 has the
    relative standard deviation 2 s / ((1 - s^2) d): O(1/d), not O(1/sqrt(d)). m_2 about doubles it,
    and dense weights were seen to fluctuate up to 5 times as much. The bound is 8 of the orthogonal
    deviations: 3 of the dense ones for a mean over 4 draws.
    """
    return 8 * power * 2 * scale / ((1 - scale**2) * features)


@pytest.fixture(scope="module")
def moments() -> dict[tuple[str, int], float]:
    """m_p of each family by Monte Carlo: with R = (I - W)^-1, |R|^2 / d and |R R^T|^2 / d."""
    torch.manual_seed(0)
    eye = torch.eye(FEATURES, dtype=torch.float64)
    result = dict.fromkeys(itertools.product(WEIGHTS, MOMENTS), 0.0)
    for name, family in WEIGHTS.items():
        for _ in range(DRAWS):
            weight = family(FEATURES, SCALE, dtype=torch.float64)().detach()
            inverse = torch.linalg.inv(eye - weight)
            for power, factor in ((1, inverse), (2, inverse @ inverse.T)):
                result[name, power] += float(factor.square().sum()) / FEATURES / DRAWS
    return result


@pytest.mark.parametrize("power", MOMENTS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_monte_carlo(moments, name, power):
    expected = MOMENTS[power](name, SCALE)
    assert moments[name, power] == pytest.approx(expected, rel=tolerance(power))


@pytest.mark.parametrize(
    ("measured", "predicted", "power"),
    [
        ("symmetric", "orthogonal", 1),
        ("orthogonal", "symmetric", 1),
        ("dense", "orthogonal", 2),
        ("symmetric", "dense", 2),
    ],
)
def test_monte_carlo_rejects_the_formula_of_another_family(moments, measured, predicted, power):
    wrong = MOMENTS[power](predicted, SCALE)
    assert moments[measured, power] != pytest.approx(wrong, rel=tolerance(power))


def test_symmetric_scale_is_the_spectral_radius_not_the_entry_scale(moments):
    # Entries of variance s^2/d would have the spectrum [-2s, 2s]: no finite value at s = 0.6. Half
    # and twice are the two ways to get the convention wrong.
    half = theory.variance("symmetric", SCALE / 2)
    assert moments["symmetric", 1] != pytest.approx(half, rel=tolerance(1))
    with pytest.raises(ValueError, match="finite limit"):
        theory.variance("symmetric", 2 * SCALE)


@pytest.mark.parametrize("name", WEIGHTS)
def test_layer_with_identity_activation_has_the_predicted_variance(name):
    torch.manual_seed(1)
    cell = AffineCell(8, FEATURES, activation="identity", weight=name, scale=SCALE).double()
    layer = DEQLayer(cell, tol=1e-8, max_iter=200, on_failure="raise")
    x = torch.randn(64, 8, dtype=torch.float64)
    with torch.no_grad():
        ratio = layer(x).square().sum(1) / cell.inject(x).square().sum(1)
    # Here c is one vector, not a trace: |z|^2 is a quadratic form, with relative deviation
    # sqrt(2 (m_2 / m_1^2 - 1) / d). x has 8 entries, so 64 samples hold 8 independent vectors.
    m1, m2 = theory.variance(name, SCALE), theory.fourth_moment(name, SCALE)
    spread = math.sqrt(2 * (m2 / m1**2 - 1) / FEATURES / 8)
    assert float(ratio.mean()) == pytest.approx(m1, rel=tolerance(1) + 4 * spread)


def test_small_scales():
    for name in WEIGHTS:
        assert theory.variance(name, 0.0) == 1
        assert theory.fourth_moment(name, 0.0) == 1
    # 2 (1/q - 1) / s^2 = 1 + 3 s^2 / 4 + O(s^4): the closed form as written loses all digits here.
    assert theory.variance("symmetric", 1e-4) == pytest.approx(1 + 0.75e-8, abs=1e-14)


@pytest.mark.parametrize("name", WEIGHTS)
def test_moments_are_those_of_a_distribution(name):
    for scale in (0.1, 0.5, 0.9, 0.999):
        assert theory.fourth_moment(name, scale) >= theory.variance(name, scale) ** 2
        assert theory.variance(name, -scale) == theory.variance(name, scale)


def test_asymptotes_in_the_docstring():
    e = 1e-6
    for name, m1, m2 in (
        ("dense", (2 * e) ** -1, (2 * e) ** -4),
        ("orthogonal", (2 * e) ** -1, 2 * (2 * e) ** -3),
        ("symmetric", 2 * (2 * e) ** -0.5, (2 * e) ** -2.5),
    ):
        # The next term of each is smaller by sqrt(2 e) at most.
        assert theory.variance(name, 1 - e) == pytest.approx(m1, rel=2 * math.sqrt(2 * e))
        assert theory.fourth_moment(name, 1 - e) == pytest.approx(m2, rel=2 * math.sqrt(2 * e))


@pytest.mark.parametrize("scale", [1.0, -1.0, 1.5, math.inf, math.nan])
@pytest.mark.parametrize("moment", MOMENTS.values())
def test_scale_outside_the_domain(moment, scale):
    for name in WEIGHTS:
        with pytest.raises(ValueError, match=r"\|scale\| < 1"):
            moment(name, scale)


def test_unknown_family():
    with pytest.raises(ValueError, match="Did you mean 'orthogonal'"):
        theory.variance("ortogonal", 0.5)
