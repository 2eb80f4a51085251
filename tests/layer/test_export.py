"""``torch.export`` of inference: the program gives what the layer gives, for other inputs and batch
sizes. Programs of general cells have the iterations one after the other."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from fastdeq import AffineCell, Anderson, Broyden, DEQLayer, Picard

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Cell(nn.Module):
    def __init__(self, size=6):
        super().__init__()
        self.linear = nn.Linear(size, size, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.mul_(0.9)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


class Pair(Cell):
    """A state of two parts, and something beside it."""

    def initial_state(self, x):
        return {"z": torch.zeros_like(x), "mean": x.new_zeros(x.shape[0])}

    def forward(self, z, x):
        value = torch.tanh(self.linear(z["z"]) + x + 0.1 * z["mean"].unsqueeze(1))
        return {"z": value, "mean": z["z"].mean(1)}, value.square().sum(1)


def check(layer, x, *, dynamic=True, grad=False, **how):
    """Exported at one batch size, run at others."""
    layer.eval()
    shapes = ({0: Dim("batch", min=1)},) if dynamic else None
    with torch.set_grad_enabled(grad):
        program = export(layer, (x,), dynamic_shapes=shapes, **how)
    run = program.module()
    with torch.no_grad():
        for batch in (len(x), 7, 1) if dynamic else (len(x),):
            other = 3 * torch.randn(batch, *x.shape[1:], dtype=x.dtype)
            torch.testing.assert_close(run(other), layer(other), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
@pytest.mark.parametrize("strict", [True, False])
def test_an_affine_layer_for_any_batch(weight, strict):
    cell = AffineCell(5, 8, weight=weight, scale=0.6, dtype=torch.float64)
    layer = DEQLayer(cell, tol=1e-9)
    check(layer, torch.randn(4, 5, dtype=torch.float64), strict=strict)


@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
def test_an_affine_layer_for_sequences(weight):
    cell = AffineCell(5, 8, weight=weight, scale=0.6, dtype=torch.float64)
    check(DEQLayer(cell, tol=1e-9), torch.randn(4, 3, 5, dtype=torch.float64))


SOLVERS = [
    Picard(fixed_iterations=6),
    "picard",
    "auto",
    Anderson(window=3),
    "heavy_ball",
    Broyden(2),
]


@pytest.mark.parametrize(
    "solver",
    SOLVERS,
    ids=["fixed", "picard", "auto", "anderson", "heavy_ball", "broyden"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_a_general_layer_for_any_batch(solver, grad):
    """Samples freeze where they would have stopped, so a program without a stop test agrees."""
    layer = DEQLayer(Cell(), solver=solver, tol=1e-2, max_iter=6, on_failure="ignore")
    check(layer, torch.randn(4, 6, dtype=torch.float64), grad=grad)


def test_it_stops_where_the_layer_stops():
    """To a loose tolerance an iterate too many would show."""
    layer = DEQLayer(Cell(), solver="picard", tol=0.3, max_iter=12)
    x = torch.randn(4, 6, dtype=torch.float64)
    check(layer, x)
    layer(x)
    assert layer.last_solution.iterations.max() < 6


def test_a_state_of_parts_with_an_auxiliary_output():
    layer = DEQLayer(Pair(), solver="picard", has_aux=True, max_iter=10, on_failure="ignore")
    check(layer, torch.randn(4, 6, dtype=torch.float64))


def test_samples_in_another_dimension():
    layer = DEQLayer(Cell(), solver="picard", batch_dim=(0, 1), max_iter=10, on_failure="ignore")
    check(layer, torch.randn(4, 3, 6, dtype=torch.float64))


def test_images_of_a_fixed_batch():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(3, 3, 3, padding=1).double()

        def forward(self, z, x):
            return torch.tanh(0.5 * self.mix(z) + x)

    layer = DEQLayer(Block(), solver="anderson", max_iter=8, on_failure="ignore")
    check(layer, torch.randn(2, 3, 5, 5, dtype=torch.float64), dynamic=False)


def test_a_layer_goes_on_after_it_was_exported():
    layer = DEQLayer(Cell(), solver="picard", max_iter=30)
    x = torch.randn(4, 6, dtype=torch.float64)
    export(layer, (x,))
    layer(x).sum().backward()
    assert layer.last_solution.converged.all()
    assert layer.last_adjoint_solution.converged.all()
