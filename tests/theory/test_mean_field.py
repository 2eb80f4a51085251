"""Mean field of nonlinear cells: against closed forms, and against draws."""

from __future__ import annotations

import math

import pytest
import torch

from fastdeq import ACTIVATIONS, Activation, Dense, Orthogonal, Symmetric, theory
from fastdeq.theory.quadrature import rule

WEIGHTS = {"dense": Dense, "orthogonal": Orthogonal, "symmetric": Symmetric}
IDENTITY = ACTIVATIONS["identity"]
FEATURES, PROBES, DRAWS = 400, 32, 3


@pytest.mark.parametrize("variance", [1e-6, 0.3, 1.0, 40.0, 1e4])
def test_quadrature(variance):
    p, weights = rule(variance, 0.0, IDENTITY.function, IDENTITY.slope)
    for power, moment in ((0, 1.0), (2, variance), (4, 3 * variance**2)):
        assert float(weights @ p**power) == pytest.approx(moment, rel=1e-10)
    inside = float(weights @ (p.abs() < 1).to(p.dtype))
    assert inside == pytest.approx(math.erf(1 / math.sqrt(2 * variance)), rel=1e-10)


def test_quadrature_with_a_reaction():
    # p - a relu(p) = h: p = h below 0 and h / (1 - a) above.
    relu = ACTIVATIONS["relu"]
    p, weights = rule(2.0, 0.6, relu.function, relu.slope)
    assert float(weights @ p**2) == pytest.approx(1 + 1 / 0.4**2, rel=1e-10)
    with pytest.raises(ValueError, match="several states"):
        rule(2.0, 1.1, relu.function, relu.slope)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 0.9, 0.99])
def test_identity_is_the_linear_cell(name, scale):
    found = theory.equilibrium(name, "identity", scale, 0.7)
    m1 = theory.variance(name, scale)
    assert found.length == pytest.approx(0.7 * m1, rel=1e-8)
    assert found.adjoint_variance == pytest.approx(m1, rel=1e-8)
    assert found.jacobian_radius == pytest.approx(scale, rel=1e-9)


def test_relu_has_closed_forms():
    for name in ("dense", "orthogonal"):
        found = theory.equilibrium(name, "relu", 1.1, 0.4)
        assert found.length == pytest.approx(0.2 / (1 - 0.605), rel=1e-9)  # q = (s^2 q + c) / 2
        assert found.jacobian_radius == pytest.approx(1.1 / math.sqrt(2), rel=1e-9)
        assert theory.edge_of_stability(name, "relu") == pytest.approx(math.sqrt(2), rel=1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("activation", ["tanh", "relu", "hardtanh", "softplus"])
def test_monte_carlo(name, activation):
    torch.manual_seed(0)
    scale, injected, phi = 0.8, 0.5, ACTIVATIONS[activation]
    found = theory.equilibrium(name, activation, scale, injected)
    rows = []
    for _ in range(DRAWS):
        W = WEIGHTS[name](FEATURES, scale, dtype=torch.float64)().detach()
        c = torch.randn(FEATURES, PROBES, dtype=torch.float64) * math.sqrt(injected)
        g = torch.randn_like(c)
        z, u = torch.zeros_like(c), torch.zeros_like(c)
        for _ in range(100):
            z = phi.function(W @ z + c)
        p = W @ z + c
        D = phi.slope(p)
        for _ in range(100):
            u = g + W.T @ (D * u)
        values = z**2, p**2, D, D**2, u**2, (D * u) ** 2
        rows.append(torch.stack([v.mean(0) for v in values], 1))
    measured = torch.stack(rows).mean(1).mean(0)
    # Probes of one W are nearly independent (their directions are): errors from their spread, and
    # twice as much as a bias of order 1/d is allowed for as W is shared.
    spread = torch.cat(rows).std(0) / math.sqrt(DRAWS * PROBES)
    predicted = torch.tensor(
        [
            found.length,
            found.preactivation_variance,
            found.mean_slope,
            found.mean_square_slope,
            found.adjoint_variance,
            found.injection_gradient_variance,
        ],
        dtype=torch.float64,
    )
    bound = 6 * spread + 4 / FEATURES * predicted
    assert ((measured - predicted).abs() < bound).all(), (measured / predicted - 1, bound)
    assert (bound < 0.2 * predicted).all()  # so that it can tell a wrong number


def test_the_reaction_is_seen():
    """Without it symmetric weights would have the numbers of dense ones of equal entries."""
    dense = theory.equilibrium("dense", "tanh", 0.4, 0.5)
    symmetric = theory.equilibrium("symmetric", "tanh", 0.8, 0.5)
    assert symmetric.length > 1.05 * dense.length


@pytest.mark.parametrize("name", WEIGHTS)
def test_bulk_radius(name):
    torch.manual_seed(1)
    found = theory.equilibrium(name, "tanh", 0.9, 0.5)
    W = WEIGHTS[name](FEATURES, 0.9, dtype=torch.float64)().detach()
    c = torch.randn(FEATURES, dtype=torch.float64) * math.sqrt(0.5)
    z = torch.zeros_like(c)
    for _ in range(200):
        z = torch.tanh(W @ z + c)
    radius = float(torch.linalg.eigvals((1 - z**2)[:, None] * W).abs().max())
    # Eigenvalues leave a disc by sqrt(log(d) / (4 d)) (Rider 2003), and slopes vary by 1/sqrt(d).
    bound = math.sqrt(math.log(FEATURES) / FEATURES)
    assert radius == pytest.approx(found.jacobian_radius, rel=bound)
    assert found.jacobian_radius == found.bulk_radius < 0.8


HYPOT = Activation(
    "hypot", lambda p: (p * p + 1).sqrt(), lambda p: p / (p * p + 1).sqrt(), monotone=False
)


def test_an_outlier_of_the_jacobian():
    """phi^2 = p^2 + 1: the map of lengths has the slope s^2, an eigenvalue outside of the bulk."""
    torch.manual_seed(2)
    s = math.sqrt(0.6)
    found = theory.equilibrium("orthogonal", HYPOT, s, 0.1)
    assert found.jacobian_radius == pytest.approx(0.6, rel=1e-9)
    assert found.bulk_radius < 0.52
    W = Orthogonal(FEATURES, s, dtype=torch.float64)().detach()
    c = torch.randn(FEATURES, dtype=torch.float64) * math.sqrt(0.1)
    z = torch.zeros_like(c)
    for _ in range(200):
        z = HYPOT.function(W @ z + c)
    eigenvalues = torch.linalg.eigvals(HYPOT.slope(W @ z + c)[:, None] * W)
    largest = eigenvalues[eigenvalues.abs().argmax()]
    # An overlap of two vectors: 2 / sqrt(d).
    assert complex(largest) == pytest.approx(0.6, abs=2 / math.sqrt(FEATURES))


# Convex and far from 0.
STEP = Activation("step", lambda p: 1 + torch.relu(p - 1), lambda p: (p > 1).to(p.dtype))


@pytest.mark.parametrize(("name", "injected"), [("dense", 0.1), ("symmetric", 0.02)])
def test_the_outlier_reaches_one_where_the_solution_ends(name, injected):
    """The last scale with a finite length is where the equations of length and reaction are
    singular, which an eigenvalue 1 of the Jacobian is: near it the outlier is 1 less a multiple of
    the root of the distance, and the bulk is not yet there."""
    edge = theory.edge_of_stability(name, STEP, injected)
    with pytest.raises(ValueError, match="Take a smaller scale"):
        theory.equilibrium(name, STEP, edge * (1 + 1e-4), injected)
    distances = []
    for gap in (1e-4, 1e-6):
        found = theory.equilibrium(name, STEP, edge * (1 - gap), injected)
        assert found.stable
        assert found.bulk_radius < found.jacobian_radius
        distances.append(1 - found.jacobian_radius)
    power = 0.5 if name == "symmetric" else 1.0  # lengths of dense weights run away instead
    assert distances[0] < 30 * 1e-4**power
    assert distances[1] == pytest.approx(distances[0] * 100**-power, rel=0.1)


def test_no_edge_in_reach():
    flat = Activation(
        "flat", lambda p: 1e-4 * p.tanh(), lambda p: 1e-4 * (1 - p.tanh() ** 2), lipschitz=1e-4
    )
    assert theory.edge_of_stability("dense", flat) == math.inf


def test_no_injection_and_no_state():
    found = theory.equilibrium("dense", "tanh", 0.9, 0.0)
    assert (found.length, found.mean_square_slope) == (0, pytest.approx(1))
    found = theory.equilibrium("dense", "sigmoid", 0.0, 0.0)
    assert found.length == 0.25


def test_an_outlier_of_symmetric_weights():
    found = theory.equilibrium("symmetric", STEP, 1.6, 0.1)
    assert found.jacobian_radius > 1.08 * found.bulk_radius
    torch.manual_seed(3)
    ratios = []
    for _ in range(16):
        W = Symmetric(FEATURES, 1.6, dtype=torch.float64)().detach()
        z, c = torch.zeros(2, FEATURES, dtype=torch.float64)
        c.normal_(std=math.sqrt(0.1))
        for _ in range(200):
            z = STEP.function(W @ z + c)
        D = STEP.slope(W @ z + c)
        ends = torch.linalg.eigvalsh(D[:, None] * W * D)
        ratios.append(float(ends[-1] / -ends[0]))
    # The outlier is on the right alone; what both ends share drops out of their ratio.
    values = torch.tensor(ratios)
    mean, bound = float(values.mean()), 3 * float(values.std()) / math.sqrt(len(ratios))
    assert mean == pytest.approx(found.jacobian_radius / found.bulk_radius, abs=bound)
    assert mean > 1 + bound


@pytest.mark.parametrize("activation", ["identity", "tanh", "hardtanh"])
def test_edges_without_an_injection(activation):
    # Orthogonal weights have the equations of dense ones: the tests with an injection see them.
    for name in ("dense", "symmetric"):
        assert theory.edge_of_stability(name, activation, 0.0) == pytest.approx(1, rel=1e-5)


def test_an_edge_as_the_scale_of_entries():
    for name, edge in (("dense", 1.0), ("symmetric", 0.5)):
        entry = theory.edge_of_stability(name, "identity", 0.0, "variance")
        assert entry == pytest.approx(edge, rel=1e-5)


def test_edges_with_an_injection():
    edges = {name: theory.edge_of_stability(name, "tanh", 1.0) for name in WEIGHTS}
    assert edges["dense"] == edges["orthogonal"] < edges["symmetric"] < 2 * edges["dense"]
    for name, edge in edges.items():
        assert theory.jacobian_radius(name, "tanh", edge, 1.0) == pytest.approx(1, abs=1e-6)
    # de Almeida and Thouless: where the adjoint diverges.
    below = theory.equilibrium("symmetric", "tanh", edges["symmetric"] * (1 - 1e-5), 1.0)
    beyond = theory.equilibrium("symmetric", "tanh", edges["symmetric"] * (1 + 1e-5), 1.0)
    assert below.stable
    assert below.adjoint_variance > 1e4
    assert not beyond.stable
    assert beyond.adjoint_variance == math.inf


def test_single_numbers():
    found = theory.equilibrium("dense", "tanh", 0.9, 0.5)
    assert theory.equilibrium_length("dense", "tanh", 0.9, 0.5) == found.length
    assert theory.mean_square_slope("dense", "tanh", 0.9, 0.5) == found.mean_square_slope


def test_refusals():
    with pytest.raises(ValueError, match="not monotone"):
        theory.equilibrium("symmetric", "gelu", 0.9)
    with pytest.raises(ValueError, match="grows without limit"):
        theory.equilibrium("dense", "relu", 1.5)
    with pytest.raises(ValueError, match="Take a smaller scale"):
        theory.equilibrium("symmetric", "relu", 1.5)
    with pytest.raises(ValueError, match="Did you mean 'tanh'"):
        theory.equilibrium("dense", "tanhh", 0.9)
    with pytest.raises(ValueError, match="injection_variance must be"):
        theory.equilibrium("dense", "tanh", 0.9, -1.0)
    with pytest.raises(ValueError, match="convention"):
        theory.edge_of_stability("dense", "tanh", 1.0, "entries")
