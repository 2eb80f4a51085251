"""``jacobian_penalty`` estimates ``|J|_F^2 / n`` per sample and is differentiable."""

import pytest
import torch
from tracked_cases import every_kind, problem, same, whole

import fastdeq
from fastdeq import AffineCell, DEQLayer, jacobian_penalty, spectral_radius


def jacobians(cell, x, z):
    """Of an affine cell with tanh: ``D W``, ``(B, d, d)``."""
    w = cell.recurrent_weight()
    return (1 - (z @ w.t() + cell.injection(x)).tanh().square()).unsqueeze(2) * w


@every_kind
def test_its_mean_is_the_frobenius_norm(kind):
    layer, cell, x = problem(kind, scale=0.8)
    z = layer(x)
    generator = torch.Generator().manual_seed(0)
    probes = 4000
    found = jacobian_penalty(layer, x, z, probes=probes, generator=generator)
    j = jacobians(cell, x, whole(z)).detach()
    expected = j.square().sum((1, 2)) / 4
    # The variance of v^T A v with signs is at most 2 |A|_F^2 <= 2 (|J|_F^2)^2: five deviations.
    bound = 5 * (2 / probes) ** 0.5
    assert ((found / expected - 1).abs() < bound).all()


@every_kind
def test_its_gradient(kind):
    """For a diagonal W every probe is exact."""
    layer, cell, x = problem(kind, scale=0.8, tol=1e-12)
    with torch.no_grad():
        cell.weight.weight.copy_(torch.diag(torch.linspace(0.2, 0.8, 4)))
    z = layer(x)
    inputs = [x, *cell.parameters()]
    for state in (z, tuple(p.detach() for p in z) if isinstance(z, tuple) else z.detach()):
        found = jacobian_penalty(layer, x, state)
        diagonal = jacobians(cell, x, whole(state)).diagonal(dim1=1, dim2=2)
        expected = diagonal.square().mean(1)
        same([found], [expected])
        a, b = (torch.autograd.grad(p.sum(), inputs, retain_graph=True) for p in (found, expected))
        # Where W is not diagonal the exact derivative is that of |J|_F^2, zero there.
        same([a[0], a[1].diagonal(), *a[2:]], [b[0], b[1].diagonal(), *b[2:]], rtol=1e-9, atol=1e-9)


@every_kind
def test_bad_samples_count_zero(kind):
    layer, cell, x = problem(kind, on_failure="ignore")
    bad = x.detach().clone()
    bad[0, 0] = torch.nan
    z = layer(bad)
    penalty = jacobian_penalty(layer, bad, z)
    assert penalty[0] == 0
    assert (penalty[1:] > 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(penalty.sum(), cell.parameters()))


def test_without_grad_mode_and_batch_dims():
    cell = AffineCell(3, 5)
    x = torch.randn(4, 3)
    with torch.no_grad():
        z = DEQLayer(cell)(x)
        penalty = jacobian_penalty(cell, x, z, probes=3)
    assert penalty.shape == (4,)
    assert not penalty.requires_grad
    w = torch.tensor([0.5, 0.25])
    for batch_dim, count in ((1, 3), ((0, 1), 12), (None, 1)):
        layer = DEQLayer(lambda z, x: w * z + x, batch_dim=batch_dim)
        x = torch.randn(4, 3, 2)
        found = jacobian_penalty(layer, x, layer(x))
        torch.testing.assert_close(found, torch.full((count,), float(w.square().mean())))
    constant = jacobian_penalty(lambda z, x: x, x, x)
    assert constant.tolist() == [0.0] * 4


def test_it_trains_a_cell_to_contract():
    cell = AffineCell(3, 8, scale=0.95)
    layer, x = DEQLayer(cell, on_failure="ignore"), torch.randn(16, 3)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.5)
    before = spectral_radius(layer, x).value.max()
    for _ in range(30):
        optimizer.zero_grad()
        jacobian_penalty(layer, x, layer(x).detach(), probes=2).mean().backward()
        optimizer.step()
    assert spectral_radius(layer, x).value.max() < 0.7 * before


def test_names_and_wrong_arguments():
    assert fastdeq.spectral_radius is fastdeq.diagnostics.spectral_radius
    cell, x, z = AffineCell(3, 5), torch.randn(4, 3), torch.randn(4, 5)
    with pytest.raises(ValueError, match="probes must be an integer >= 1"):
        jacobian_penalty(cell, x, z, probes=0)
    with pytest.raises(TypeError, match="generator must be"):
        jacobian_penalty(cell, x, z, generator=3)
    with pytest.raises(TypeError, match="unknown option 'probe'"):
        jacobian_penalty(cell, x, z, probe=1)
    with pytest.raises(TypeError, match="cell must be a module or function"):
        jacobian_penalty(AffineCell, x, z)
