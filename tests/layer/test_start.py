"""A start that does not suit the input says what it is, what x is, and what to pass."""

import pytest
import torch
from layer_cases import Residual
from torch import nn

from fastdeq import Anderson, ConvergenceError, DEQLayer


class Started(Residual):
    def initial_state(self, x):
        return x.new_zeros(len(x), 6)


class Pair(nn.Module):
    def initial_state(self, x):
        return x.new_zeros(len(x), 6), x.new_zeros(len(x), 3)

    def forward(self, z, x):
        u, v = z
        return 0.5 * u + x, 0.5 * v + u[:, :3]


@pytest.mark.parametrize("kind", [Residual, Started])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_another_batch_than_that_of_the_input(kind, batch):
    layer, x = DEQLayer(kind()), torch.zeros(5, 6)
    with pytest.raises(ValueError, match=rf"z0 is \({batch}, 6\).*\(5, 6\).*Pass z0"):
        layer(x, z0=torch.zeros(batch, 6))
    with pytest.raises(ValueError, match=r"Pass z0"):
        layer(x, z0=torch.zeros(6))
    layer(x, z0=torch.zeros(5, 6))


def test_another_batch_in_another_dimension():
    layer = DEQLayer(lambda z, x: 0.5 * z + x, batch_dim=1)
    with pytest.raises(ValueError, match=r"z0 is \(3, 2, 6\).*batch \(4,\).*batch_dim=1"):
        layer(torch.zeros(3, 4, 6), z0=torch.zeros(3, 2, 6))


def test_a_start_that_would_be_broadcast():
    """More samples than x, from a cell that says how many there are."""
    x = torch.zeros(1, 6)
    with pytest.raises(ValueError, match=r"z0 is \(5, 6\).*starts from \(1, 6\)"):
        DEQLayer(Started())(x, z0=torch.zeros(5, 6))
    shared = DEQLayer(Residual())(x, z0=torch.zeros(5, 6))  # one x for five samples
    assert shared.shape == (5, 6)


@pytest.mark.parametrize("kind", [Residual, Started])
def test_another_dtype_or_device(kind):
    layer, x = DEQLayer(kind()), torch.zeros(5, 6)
    with pytest.raises(ValueError, match=r"float64 on cpu, and x .*float32.*Pass z0 in torch\.flo"):
        layer(x, z0=torch.zeros(5, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"Pass z0 in torch\.float32"):
        layer(x, z0=torch.zeros(5, 6, dtype=torch.bfloat16))
    wider = DEQLayer(lambda z, x: 0.5 * z + x)  # a cell that takes any
    assert wider(x, z0=torch.zeros(5, 6, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match="Pass z0 on cpu"):
        layer(x, z0=torch.zeros(5, 6, device="meta"))


def test_another_number_of_parts():
    layer, x = DEQLayer(Pair()), torch.zeros(5, 6)
    for z0 in (torch.zeros(5, 6), (torch.zeros(5, 6),), (torch.zeros(5, 6),) * 3):
        with pytest.raises(ValueError, match=r"z0 is .*starts from \(\(5, 6\).*; \(5, 3\)"):
            layer(x, z0=z0)
    with pytest.raises(ValueError, match=r"\(4, 3\).*starts from"):
        layer(x, z0=(torch.zeros(4, 6), torch.zeros(4, 3)))
    with pytest.raises(ValueError, match=r"starts from"):
        layer(x, z0=(torch.zeros(5, 6), torch.zeros(4, 3)))
    layer(x, z0=[torch.zeros(5, 6), torch.ones(5, 3)])


def test_errors_of_another_kind_stay_as_they_are():
    x = torch.zeros(5, 6)

    def broken(z, x):
        raise RuntimeError("of the cell's own")

    with pytest.raises(RuntimeError, match="of the cell's own"):
        DEQLayer(broken)(x, z0=torch.zeros(5, 6))
    with pytest.raises(RuntimeError, match="of the cell's own"):
        DEQLayer(broken)([x], z0=torch.zeros(5, 6))
    failing = DEQLayer(lambda z, x: 2 * z + 1, solver="picard", on_failure="raise", max_iter=3)
    with pytest.raises(ConvergenceError):
        failing(x.double(), z0=torch.zeros(4, 6))


def test_an_affine_cell_on_the_general_path():
    class Halving(Anderson):
        name = "halving"

    from layer_cases import affine

    layer = DEQLayer(affine(), solver=Halving())
    with pytest.raises(ValueError, match=r"z0 is \(3, 6\).*starts from \(5, 6\)"):
        layer(torch.zeros(5, 6), z0=torch.zeros(3, 6))
