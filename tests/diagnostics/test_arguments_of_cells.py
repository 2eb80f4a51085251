"""Diagnostics call the cell as its layer does: auxiliary outputs, leading dimensions, keywords."""

import pytest
import torch

from fastdeq import AffineCell, DEQLayer, jacobian_penalty, spectral_radius
from fastdeq.diagnostics import jacobian_norm


def masked(z, x, mask):
    return torch.tanh(0.5 * mask * z + x)


def test_the_penalty_of_a_cell_with_auxiliary_output():
    layer = DEQLayer(lambda z, x: (0.5 * z + x, x.sum()), has_aux=True)
    x = torch.randn(3, 4)
    z, _ = layer(x)
    # A diagonal J is exact for every probe; 0.25 has no rounding.
    assert jacobian_penalty(layer, x, z).tolist() == [0.25] * 3


@pytest.mark.parametrize("shape", [(2, 3, 4), (4,)], ids=["two", "none"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["layer", "cell"])
def test_the_penalty_has_a_number_for_each_vector(shape, wrapped):
    torch.manual_seed(0)
    layer = DEQLayer(AffineCell(4, 5))
    cell = layer if wrapped else layer.cell
    x = torch.randn(shape)
    z = layer(x)
    signs = [torch.Generator().manual_seed(1) for _ in range(2)]
    found = jacobian_penalty(cell, x, z, generator=signs[0])
    rows = jacobian_penalty(cell, x.reshape(-1, 4), z.reshape(-1, 5), generator=signs[1])
    assert found.shape == layer.last_solution.residual.shape
    assert found.shape == spectral_radius(layer, x, z).value.shape
    assert torch.equal(found, rows)
    with pytest.raises(ValueError, match=r"^z is .* must have shape"):
        jacobian_penalty(cell, x, torch.zeros(7, 5))


@pytest.mark.parametrize("wrapped", [True, False], ids=["layer", "cell"])
def test_keyword_arguments_go_to_the_cell(wrapped):
    cell = DEQLayer(masked) if wrapped else masked
    x, z, mask = torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([[1.0], [0.5]])
    assert jacobian_penalty(cell, x, z, mask=mask).tolist() == [0.25, 0.0625]
    for measure in (spectral_radius, jacobian_norm):
        for state in (z, None):
            found = measure(cell, x, state, mask=mask, tol=1e-3)
            torch.testing.assert_close(found.value, torch.tensor([0.5, 0.25]))


@pytest.mark.parametrize("measure", [spectral_radius, jacobian_norm, jacobian_penalty])
@pytest.mark.parametrize("cell", [masked, AffineCell(3, 3)], ids=["general", "affine"])
def test_keywords_that_neither_takes_raise(measure, cell):
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"unknown option 'masks'.*valid options: context"):
        measure(cell, x, x, masks=x)
