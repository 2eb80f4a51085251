"""Peaceman-Rachford splitting against dense solves, and where plain steps cannot go."""

import pytest
import torch
from torch import nn

from fastdeq import AffineCell, Anderson, DEQLayer, PeacemanRachford, Status, fixed_point

F64 = torch.float64


class Monotone(nn.Module):
    """``W = (1 - m) I - A^T A + B - B^T``: ``x^T (I - W) x >= m |x|^2``."""

    def __init__(self, size, skew, m=0.1):
        super().__init__()
        self.a = nn.Parameter(torch.randn(size, size, dtype=F64) / size**0.5)
        self.b = nn.Parameter(skew * torch.randn(size, size, dtype=F64) / size**0.5)
        self.m, self.size = m, size

    def forward(self):
        eye = torch.eye(self.size, dtype=F64)
        return (1 - self.m) * eye - 0.2 * self.a.t() @ self.a + self.b - self.b.t()


def layer_of(activation, solver, skew=2.0, size=16, **options):
    cell = AffineCell(5, size, activation=activation, weight=Monotone(size, skew), dtype=F64)
    options = {"adjoint": "gmres", "tol": 1e-9, "max_iter": 2000} | options
    return DEQLayer(cell, solver=solver, **options)


@pytest.mark.parametrize(
    ("activation", "solver"),
    [("relu", PeacemanRachford(alpha=0.3)), ("relu", PeacemanRachford())]
    + [(name, "peaceman_rachford") for name in ("tanh", "sigmoid", "hardtanh", "leaky_relu")],
    ids=str,
)
def test_a_large_skew_part(activation, solver):
    layer = layer_of(activation, solver)
    x = torch.randn(6, 5, dtype=F64)
    z = layer(x)
    cell = layer.cell
    assert layer.last_solution.converged.all()
    # Strong monotonicity: |z - z*| <= |z - f(z)| (1 + |W|) / m.
    value = cell(z, x)
    bound = 1e-9 * value.norm(dim=1)
    assert ((value - z).norm(dim=1) <= bound).all()


def test_plain_steps_and_mixing_fail_there():
    x = torch.randn(6, 5, dtype=F64)
    layer = layer_of("relu", PeacemanRachford(), skew=3.0, size=32)
    other = DEQLayer(layer.cell, solver=Anderson(), tol=1e-9, max_iter=2000, on_failure="ignore")
    layer(x)
    other(x)
    assert layer.last_solution.converged.all()
    assert not other.last_solution.converged.any()


def test_identity_is_a_dense_solve():
    layer = layer_of("identity", PeacemanRachford(), tol=1e-12)
    x = torch.randn(3, 5, dtype=F64)
    w, c = layer.cell.recurrent_weight(), layer.cell.inject(x)
    exact = torch.linalg.solve(torch.eye(16, dtype=F64) - w, c.t()).t()
    assert float((layer(x) - exact).norm() / exact.norm()) < 1e-9


def test_iterates_are_those_of_the_definition():
    layer = layer_of("relu", PeacemanRachford(alpha=0.5), tol=0.0, max_iter=7, on_failure="ignore")
    x = torch.randn(2, 5, dtype=F64)
    w, c = layer.cell.recurrent_weight().detach(), layer.cell.inject(x).detach()
    inverse = torch.linalg.inv(torch.eye(16, dtype=F64) + 0.5 * (torch.eye(16, dtype=F64) - w))
    u = c  # the argument of phi at zero
    for _ in range(6):
        z = u.clamp(min=0)
        v = 2 * z - u
        u = 2 * (v + 0.5 * c) @ inverse.t() - v
    z = u.clamp(min=0)
    # The best iterate is returned, which need not be the last.
    found = layer(x)
    own, last = ((layer.cell(t, x) - t).norm(dim=1) for t in (found, z))
    same = (found - z).norm(dim=1) < 1e-12
    assert (same | (own <= last)).all()
    assert same.any()


def test_the_gradient_is_implicit():
    layer = layer_of("tanh", "peaceman_rachford", skew=1.0, size=4, tol=1e-12)
    x = torch.randn(2, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x, atol=1e-5)


def test_a_bad_sample_harms_no_other():
    layer = layer_of("relu", PeacemanRachford(), on_failure="ignore")
    x = torch.randn(4, 5, dtype=F64)
    alone = layer(x)
    x[2] = torch.inf
    z = layer(x)
    assert layer.last_solution.status[2] == Status.NONFINITE
    assert torch.equal(z[[0, 1, 3]], alone[[0, 1, 3]])


def test_a_singular_resolvent_ends_calmly():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(2 * torch.eye(3, dtype=F64))

        def forward(self):
            return self.w

    cell = AffineCell(3, 3, activation="relu", weight=Twice(), dtype=F64)
    nn.init.ones_(cell.injection.weight)
    nn.init.zeros_(cell.injection.bias)
    layer = DEQLayer(cell, solver="peaceman_rachford", on_failure="ignore", max_iter=20)
    z = layer(torch.ones(2, 3, dtype=F64))
    assert z.isfinite().all()
    assert not layer.last_solution.converged.any()


def test_what_it_cannot_solve_is_refused():
    with pytest.raises(ValueError, match="monotone activation"):
        layer_of("gelu", "peaceman_rachford")(torch.ones(1, 5, dtype=F64))
    with pytest.raises(ValueError, match="relu where alpha is not 1"):
        layer_of("tanh", PeacemanRachford(alpha=2.0))(torch.ones(1, 5, dtype=F64))
    with pytest.raises(ValueError, match="solved as a general map"):
        fixed_point(torch.cos, torch.zeros(2, 3), solver="peaceman_rachford")
    with pytest.raises(ValueError, match="forward problems"):
        DEQLayer(AffineCell(3, 3), adjoint="peaceman_rachford")
    with pytest.raises(ValueError, match="alpha must be"):
        PeacemanRachford(alpha=0.0)
