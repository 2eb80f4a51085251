"""One draw against its definitions: the derivative by autograd, all else by other formulas."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("pyarrow")

from fastdeq.study import Ensemble, measure
from fastdeq.weights import WEIGHTS


@pytest.mark.parametrize("family", ["dense", "orthogonal", "symmetric"])
def test_a_draw_has_the_numbers_of_its_definitions(family):
    d, scale, variance = 12, 0.6, 4.0
    found = measure(
        Ensemble(family, scale, "tanh", features=d, draws=1, injection_variance=variance, seed=5)
    )
    torch.manual_seed(5)
    w = WEIGHTS[family](d, scale, dtype=torch.float64)().detach()
    c, g = 2 * torch.randn(d, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    z = torch.zeros_like(c)
    for _ in range(500):
        z = torch.tanh(w @ z + c)
    j = torch.autograd.functional.jacobian(lambda z: torch.tanh(w @ z + c), z)
    r = torch.linalg.inv(torch.eye(d, dtype=torch.float64) - j)
    slopes = 1 - z.square()
    expected = {
        "length": z.dot(z) / c.dot(c),
        "adjoint": torch.linalg.solve((torch.eye(d) - j).t(), g).square().sum() / g.dot(g),
        "resolvent": torch.linalg.matrix_norm(r, 2),
        "moment_1": r.square().sum() / d,
        "moment_2": (r @ r.t()).square().sum() / d,
        "mean_square_slope": slopes.square().sum() / d,
        "radius": torch.linalg.eigvals(j).abs().max(),
    }
    assert found["solved"] == [True]
    for name, value in expected.items():
        # The equilibrium of the draw is one of 1e-10.
        assert math.isclose(found[name][0], float(value), rel_tol=1e-8), name
