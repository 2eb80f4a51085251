"""Everything of a layer that is per sample follows ``batch_dim``."""

import re

import pytest
import torch
from coupled_cases import F64, graph
from layer_cases import affine

from fastdeq import Anderson, CoupledSamplesError, DEQLayer, Status
from fastdeq.diagnostics import jacobian_norm, spectral_radius


def test_sparse_input():
    a = graph(5, (0, 1), (1, 0), (2, 3), (4, 0))
    for layout in (a.to_sparse(), a.to_sparse_csr()):
        layer = DEQLayer(lambda z, s: torch.tanh(s @ z + 1), batch_dim=None)
        z = layer(layout, z0=torch.zeros(5, 2, dtype=F64))
        torch.testing.assert_close(z, torch.tanh(a @ z + 1), rtol=1e-3, atol=1e-3)


def test_fused_cells_are_not_looked_at_and_have_rows():
    layer = DEQLayer(affine(), batch_dim=-2)
    assert "batch_dim=-2" in repr(layer)
    assert "batch_dim" not in repr(DEQLayer(affine()))
    layer(torch.randn(4, 6)).sum().backward()
    assert not layer._checked._keys
    for wrong in (1, None, (0, 1), -1):
        with pytest.raises(ValueError, match=re.escape(f"batch_dim={wrong},")):
            DEQLayer(affine(), batch_dim=wrong)(torch.randn(4, 6))


def test_affine_cells_on_the_general_path():
    class Halving(Anderson):
        name = "halving"

    x = torch.randn(4, 6)
    expected = DEQLayer(affine_cell := affine(), tol=1e-6)(x)
    for batch_dim in (0, -2, None):
        layer = DEQLayer(affine_cell, solver=Halving(), batch_dim=batch_dim, tol=1e-6)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(CoupledSamplesError):  # features are no samples
        DEQLayer(affine_cell, solver=Halving(), batch_dim=1, on_failure="ignore")(x)


@pytest.mark.parametrize("poison", [torch.nan, -torch.inf])
@pytest.mark.parametrize(
    ("batch_dim", "index", "sample"),
    [(1, (slice(None), 2), 2), ((0, 1), (1, 2), 6), ((1, 0), (1, 2), 7), (-1, (..., 1), 1)],
    ids=str,
)
def test_samples_of_the_input_that_are_not_finite(batch_dim, index, sample, poison):
    layer = DEQLayer(lambda z, x: 0.5 * torch.tanh(z) + x, batch_dim=batch_dim, on_failure="ignore")
    x = torch.randn(3, 4, 5)
    clean, bad = x.clone().requires_grad_(), x.clone()
    bad[(1, 2, 1)] = poison
    bad.requires_grad_()
    found = []
    for leaf in (clean, bad):
        z = layer(leaf)
        z.pow(2).sum().backward()
        found.append((z.detach(), leaf.grad))
    touched = torch.zeros(3, 4, 5, dtype=torch.bool)
    touched[index] = True
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a[~touched], b[~touched])
        assert (b[touched] == 0).all()
    status = layer.last_solution.status.tolist()
    assert status.pop(sample) == Status.NONFINITE
    assert set(status) == {Status.CONVERGED}


@pytest.mark.parametrize("shape", [(), (3,), (3, 4)])
def test_all_of_the_input_is_one_sample(shape):
    layer = DEQLayer(lambda z, x: 0.5 * z + x, batch_dim=None, on_failure="ignore")
    x = torch.ones(shape)
    x.view(-1)[-1] = torch.nan
    z = layer(x.requires_grad_())
    z.sum().backward()
    assert layer.last_solution.status.tolist() == [Status.NONFINITE]
    assert (z == 0).all()
    assert (x.grad == 0).all()


def test_input_that_only_looks_like_samples():
    """x (T, n) with n = B beside a state (T, B, d): a column is no sample."""
    x = torch.ones(3, 4)
    x[0, 2] = torch.nan
    layer = DEQLayer(lambda z, x: 0.5 * z + x.nan_to_num().sum(1)[:, None, None], batch_dim=1)
    layer(x, z0=torch.zeros(3, 4, 2))
    assert layer.last_solution.converged.all()


def test_diagnostics_follow_the_layer():
    a = graph(6, (0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4))
    cell, x = (lambda z, x: a @ z + x), torch.ones(6, 2, dtype=F64)
    whole = DEQLayer(cell, batch_dim=None)
    for measure in (spectral_radius, jacobian_norm):
        found = measure(whole, x, tol=0)
        torch.testing.assert_close(found.value, torch.tensor([0.5], dtype=F64))
        with pytest.raises(CoupledSamplesError):
            measure(cell, x, x)
