"""Cells and calls that do not fit: the error says what was there, and what to do."""

import pytest
import torch
from torch import nn

from fastdeq import AffineCell, BackendError, DEQLayer, fixed_point, trajectory


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.inject = nn.Linear(16, 16), nn.Linear(4, 16)

    def forward(self, z, x):
        return torch.tanh(0.1 * self.recurrent(z) + self.inject(x))


@pytest.mark.parametrize("solver", ["broyden", "newton_krylov"])
def test_solvers_in_plain_pytorch_do_not_pass_for_others(solver):
    layer = DEQLayer(lambda z, x: 0.5 * z + x, solver=solver, backend="cpp")
    with pytest.raises(BackendError, match=f"{solver}' is in plain PyTorch alone"):
        layer(torch.ones(2, 3))
    layer = DEQLayer(lambda z, x: 0.5 * z + x, adjoint="bicgstab", backend="cpp")
    z = layer(torch.ones(2, 3, requires_grad=True))
    with pytest.raises(BackendError, match="adjoint solve: solver 'bicgstab' is in plain PyTorch"):
        z.sum().backward()


def test_a_state_wider_than_x_names_the_start():
    layer, x = DEQLayer(Wide()), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r"multiplied.*zeros like x, \(3, 4\).*pass z0") as seen:
        layer(x)
    assert "initial_state(x)" in str(seen.value)
    assert type(seen.value.__cause__) is RuntimeError
    assert layer(x, z0=torch.zeros(3, 16)).shape == (3, 16)


@pytest.mark.parametrize("error", [RuntimeError, ValueError], ids=lambda e: e.__name__)
def test_other_errors_of_a_cell_stay_as_they_are(error):
    def cell(z, x):
        raise error("the service is down")

    with pytest.raises(error, match=r"^the service is down$"):
        DEQLayer(cell)(torch.zeros(2, 3))


def test_a_start_of_the_cells_own_is_not_called_zeros():
    class Started(Wide):
        def initial_state(self, x):
            return x.new_zeros(len(x), 7)

    with pytest.raises(RuntimeError, match="cannot be multiplied") as seen:
        DEQLayer(Started())(torch.randn(3, 4))
    assert "zeros like x" not in str(seen.value)


def test_more_states_than_updates():
    layer, x = DEQLayer(AffineCell(4, 4), max_iter=3, on_failure="ignore"), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"states=6.*at most 3 updates.*raise max_iter"):
        trajectory(layer, x, states=6)
    assert len(trajectory(layer, x, states=3)) == 3
    assert len(trajectory(layer, x, states=1)) == 1


def test_a_trajectory_with_auxiliary_output_has_a_way_out():
    layer = DEQLayer(lambda z, x: (0.5 * z + x, x), has_aux=True)
    with pytest.raises(ValueError, match=r"has_aux=True.*DEQLayer\(lambda z, x: cell\(z, x\)\[0\]"):
        trajectory(layer, torch.zeros(2, 3), states=2)


def test_an_affine_cell_has_no_auxiliary_output():
    with pytest.raises(ValueError, match="has_aux=True, but an AffineCell returns its state alone"):
        DEQLayer(AffineCell(4, 4), has_aux=True)


@pytest.mark.parametrize("to", [torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)], ids=["rows", "more"])
def test_a_map_that_returns_integers(to, shape):
    with pytest.raises(TypeError, match=f"returned {to} for a state in torch.float32"):
        fixed_point(lambda z: z.to(to), torch.zeros(shape))
    with pytest.raises(TypeError, match=f"returned {to} for a state in torch.float32"):
        DEQLayer(lambda z, x: (0.5 * z[0], z[1].to(to)))(
            torch.zeros(shape), z0=(torch.zeros(shape), torch.zeros(shape))
        )
