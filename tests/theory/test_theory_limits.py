"""Conventions, spectra, norms, untied weights and fluctuations of the linear cell against draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastdeq import Dense, Orthogonal, Symmetric, theory

WEIGHTS = {"dense": Dense, "orthogonal": Orthogonal, "symmetric": Symmetric}
FEATURES, SCALE, DRAWS = 200, 0.6, 40


def draw(name, features=FEATURES, scale=SCALE):
    return WEIGHTS[name](features, scale, dtype=torch.float64)().detach()


@pytest.fixture(scope="module", params=WEIGHTS)
def sample(request):
    """Of many draws at one c and g: tr R R^T / d, |z|^2, |R^T z|^2, |u|^2, c.z; R = (I - W)^-1."""
    torch.manual_seed(0)
    c, g = torch.nn.functional.normalize(torch.randn(2, FEATURES, dtype=torch.float64), dim=1)
    rows = []
    for _ in range(DRAWS):
        R = torch.linalg.inv(torch.eye(FEATURES, dtype=torch.float64) - draw(request.param))
        z, u = R @ c, R.T @ g
        trace = R.square().sum() / FEATURES
        rows.append([trace, z @ z, (R.T @ z).square().sum(), u @ u, c @ z, (u @ u) * (z @ z)])
    return request.param, torch.tensor(rows, dtype=torch.float64)


def close(values, expected):
    """Within 4 standard errors, and a bias of 2 / d times the amplification 1 / (1 - s^2)."""
    error = 4 * float(values.std()) / math.sqrt(len(values))
    bias = 2 / FEATURES / (1 - SCALE**2) * expected
    return abs(float(values.mean()) - expected) < error + bias


def test_state_adjoint_and_gradients(sample):
    name, rows = sample
    m1, m2 = theory.variance(name, SCALE), theory.fourth_moment(name, SCALE)
    for column, expected in enumerate((m1, m1, m2, m1, theory.overlap(name, SCALE))):
        assert close(rows[:, column], expected), column
        assert not close(rows[:, column], 1.25 * expected), column
    assert close(rows[:, 5], theory.weight_gradient_moment(name, SCALE))
    assert theory.weight_gradient_moment(name, SCALE, of_length=True) == pytest.approx(m1 * m2)


def test_fluctuations(sample):
    name, rows = sample
    cv = rows.std(0) / rows.mean(0)
    # A standard deviation of n draws is known to 1 / sqrt(2 n): 4 of these, 45 %.
    bound = 4 / math.sqrt(2 * DRAWS)
    trace, whole = (f(name, SCALE, FEATURES) for f in (theory.trace_variation, theory.variation))
    assert float(cv[0]) == pytest.approx(trace, rel=bound)
    assert float(cv[1]) == pytest.approx(whole, rel=bound)
    assert whole > 4 * trace  # so that one cannot be taken for the other


def test_fluctuations_near_zero_scale():
    """To first order in W, tr R R^T / d = 1 + 2 tr W / d, and |z|^2 = 1 + 2 c^T W c."""
    for name, trace in (("dense", 4.0), ("orthogonal", 4.0), ("symmetric", 2.0)):
        s, d = 1e-4, 1000
        assert theory.trace_variation(name, s, d) == pytest.approx(
            math.sqrt(trace) * s / d, rel=1e-3
        )
        expected = 2 * s / math.sqrt(d) / (1 if name != "symmetric" else math.sqrt(2))
        assert theory.variation(name, s, d) == pytest.approx(expected, rel=2 / math.sqrt(d))


def test_dense_trace_has_the_terms_of_its_expansion():
    """Var(tr R R^T) = 4 s^2 + 26 s^4 + ..., counted by hand from tr W, tr W^2 and tr W W^T."""
    s = 0.02
    total = (theory.trace_variation("dense", s, 1) * theory.variance("dense", s)) ** 2
    assert (total - 4 * s**2) / s**4 == pytest.approx(26, abs=200 * s**2)


@pytest.mark.parametrize("scale", [0.3, 0.8])
def test_symmetric_trace_by_the_coefficients_of_its_function(scale):
    """Johansson's sum with the Fourier coefficients of (1 - s cos t)^-2, from a transform."""
    t = torch.arange(512, dtype=torch.float64) * (2 * math.pi / 512)
    a = torch.fft.rfft((1 - scale * t.cos()) ** -2).real / 256
    total = math.sqrt(float((torch.arange(257) * a**2).sum()) / 2)
    m1 = theory.variance("symmetric", scale)
    assert float(a[0]) / 2 != pytest.approx(m1)  # the mean over t is that of the arcsine law
    assert theory.trace_variation("symmetric", scale, 1) == pytest.approx(total / m1, rel=1e-9)


@pytest.mark.parametrize("name", WEIGHTS)
def test_variation_is_that_of_the_direction_and_of_the_trace(name):
    for s, d in ((0.6, 3), (0.9, 100)):
        m1, m2 = theory.variance(name, s), theory.fourth_moment(name, s)
        direction = 2 * (m2 / m1**2 - 1) / (d + 2)
        both = direction + theory.trace_variation(name, s, d) ** 2
        assert theory.variation(name, s, d) ** 2 == pytest.approx(both, rel=1e-12)


@pytest.mark.parametrize("name", WEIGHTS)
def test_untied(name):
    torch.manual_seed(1)
    eye = torch.eye(FEATURES, dtype=torch.float64)
    scale = theory.spectral_radius(name, SCALE)  # so that all three have entries of one size
    second, fourth = [], []
    for _ in range(4):
        R = eye
        for _ in range(15):  # the rest is below 0.6^30
            R = eye + draw(name, scale=scale) @ R
        second.append(float(R.square().sum() / FEATURES))
        fourth.append(float((R @ R.T).square().sum() / FEATURES))
    # Traces deviate by a few / d: 4 per entry of the power, for means over 4 draws.
    for power, values, predicted in (
        (1, second, theory.untied_variance(name, scale)),
        (2, fourth, theory.untied_fourth_moment(name, scale)),
    ):
        assert sum(values) / 4 == pytest.approx(predicted, rel=4 * power / FEATURES)
    if name != "symmetric":  # tied ones have no limit at this scale
        tied = theory.fourth_moment(name, scale)
        assert sum(fourth) / 4 != pytest.approx(tied, rel=8 / FEATURES)


def test_tied_equals_untied_in_the_second_moment_but_for_symmetric_weights():
    for name in ("dense", "orthogonal"):
        assert theory.untied_variance(name, 0.7) == pytest.approx(theory.variance(name, 0.7))
    assert theory.untied_variance("symmetric", 0.7) < theory.variance("symmetric", 0.7)
    assert theory.untied_variance("symmetric", 1.5) == pytest.approx(1 / (1 - 0.75**2))
    with pytest.raises(ValueError, match="scale < 2"):
        theory.untied_variance("symmetric", 2.0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_norms(name):
    torch.manual_seed(2)
    W = draw(name, 400)
    values = torch.linalg.svdvals(torch.eye(400, dtype=torch.float64) - W)
    # Edges move by about d^(-2/3) of the distance over which the density grows; the dense left edge
    # is the cube of a distance, so its square root moves 3/2 times as much: 3 of these.
    bound = 3 * 1.5 * 400 ** (-2 / 3)
    assert 1 / float(values[-1]) == pytest.approx(theory.resolvent_norm(name, SCALE), rel=bound)
    norm = float(torch.linalg.matrix_norm(W, 2))
    assert norm == pytest.approx(theory.weight_norm(name, SCALE), rel=bound)


def test_dense_norm_is_where_the_transform_turns():
    for s in (0.1, 0.6, 0.99):
        u = (4 - s**2 + s * math.sqrt(8 + s**2)) / (4 * (1 - s**2))
        edge = 1 / u**2 - s**2 / (u * (u - 1))
        assert theory.resolvent_norm("dense", s) == pytest.approx(edge**-0.5, rel=1e-9)
    e = 1e-6
    near = theory.resolvent_norm("dense", math.sqrt(1 - e))
    assert near == pytest.approx(math.sqrt(27 / 4) * e**-1.5, rel=1e-4)
    assert theory.resolvent_norm("dense", 0.0) == 1


def test_densities_integrate_to_one_and_have_the_second_moment():
    grid = torch.linspace(-0.8, 0.8, 801, dtype=torch.float64)
    step = float(grid[1] - grid[0])
    semicircle = theory.eigenvalue_density("symmetric", 0.8, grid) * step
    assert float(semicircle.sum()) == pytest.approx(1, abs=1e-3)
    assert float((semicircle * grid**2).sum()) == pytest.approx(0.8**2 / 4, rel=1e-3)
    plane = torch.complex(grid[:, None].expand(801, 801), grid[None].expand(801, 801))
    disc = theory.eigenvalue_density("dense", 0.6, plane) * step**2
    assert float(disc.sum()) == pytest.approx(1, abs=0.01)
    angle = theory.eigenvalue_density("orthogonal", 0.6, grid)
    assert angle.tolist() == [1 / (2 * math.pi)] * 801
    with pytest.raises(TypeError, match="must be real"):
        theory.eigenvalue_density("symmetric", 0.6, plane)


def test_boundaries():
    circle = theory.eigenvalue_boundary("dense", 0.7, 9)
    assert circle.abs().tolist() == pytest.approx([0.7] * 9)
    ends = theory.eigenvalue_boundary("symmetric", 0.7, 2)
    assert ends.tolist() == [-0.7, 0.7]
    with pytest.raises(ValueError, match="points must be an integer >= 2"):
        theory.eigenvalue_boundary("dense", 0.7, 1)


@pytest.mark.parametrize("name", WEIGHTS)
def test_conventions(name):
    torch.manual_seed(3)
    W = draw(name)
    e = theory.entry_scale(name, SCALE)
    # d^2 squares of entries, each with a relative variance of 2, in pairs where symmetric.
    assert float(W.square().mean()) * FEATURES == pytest.approx(e**2, rel=8 / FEATURES)
    assert theory.spectral_radius(name, e) == pytest.approx(SCALE)
    with pytest.raises(ValueError, match="entry_scale must be finite"):
        theory.spectral_radius(name, -1.0)


def test_width_that_predictions_need():
    at = {name: theory.effective_width(name, 0.6, 100) for name in WEIGHTS}
    assert at == pytest.approx({"dense": 100 * 0.8**4, "orthogonal": 64, "symmetric": 51.2})
    with pytest.raises(ValueError, match="features must be an integer >= 1"):
        theory.variation("dense", 0.9, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.variance("dense", "0.9"), "scale must be a real number"),
        (lambda: theory.weight_norm("dense", None), "scale must be a real number"),
        (lambda: theory.eigenvalue_density("dense", 1j, torch.zeros(2)), "scale must be"),
        (lambda: theory.variation("dense", torch.zeros(2), 9), "scale must be a real number"),
        (lambda: theory.equilibrium("dense", "tanh", 0.9, "1"), "injection_variance must be"),
        (lambda: theory.eigenvalue_density("dense", 0.9, [0.1]), "tensor of points, not list"),
    ],
    ids=["text", "none", "complex", "tensor", "injection", "points"],
)
def test_what_is_no_number(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_numbers_of_other_libraries():
    assert theory.variation("dense", np.float32(0.5), np.int64(256)) == theory.variation(
        "dense", 0.5, 256
    )
    assert theory.variance("dense", torch.tensor(0.5)) == theory.variance("dense", 0.5)
    for features in (256.0, True):
        with pytest.raises(ValueError, match="features must be an integer"):
            theory.variation("dense", 0.5, features)
