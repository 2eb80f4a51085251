"""Gradients through steps where no sample makes any: zero, and not absent."""

from __future__ import annotations

import pytest
import torch

from fastdeq import AffineCell, DEQLayer, Unrolled

METHODS = ["truncated", "unrolled", Unrolled(checkpoint=True), "reversible"]
IDS = ["truncated", "unrolled", "checkpointed", "reversible"]


class _Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(0.1 * torch.eye(4))

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z @ self.w + x)


def _cells() -> list[torch.nn.Module]:
    return [AffineCell(4, 4, scale=0.5), _Recurrent()]


@pytest.mark.parametrize("gradient", METHODS, ids=IDS)
@pytest.mark.parametrize("which", [0, 1], ids=["affine", "general"])
def test_a_start_at_the_equilibrium_has_a_zero_gradient(which, gradient):
    torch.manual_seed(0)
    cell = _cells()[which]
    layer = DEQLayer(cell, gradient=gradient, tol=1e-3)
    x = torch.randn(3, 4, requires_grad=True)
    start = DEQLayer(cell, tol=1e-6)(x).detach()
    z = layer(x, z0=start)
    assert int(layer.last_solution.iterations.max()) == 0
    z.square().sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in cell.parameters())
    z.data.zero_()
    assert start.any()  # z has memory of its own
    assert layer.last_solution.value.any()


@pytest.mark.parametrize("gradient", METHODS, ids=IDS)
@pytest.mark.parametrize("which", [0, 1], ids=["affine", "general"])
def test_samples_that_are_all_nan_have_a_zero_gradient(which, gradient):
    layer = DEQLayer(_cells()[which], gradient=gradient, on_failure="ignore")
    x = torch.full((2, 4), torch.nan, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_cell_that_returns_nan_gets_no_nan_gradient():
    w = torch.ones(4, requires_grad=True)
    layer = DEQLayer(
        lambda z, x: torch.sqrt(w * z - 1 + x), gradient="unrolled", on_failure="ignore"
    )
    layer(torch.zeros(2, 4)).sum().backward()
    assert w.grad is not None
    assert not w.grad.any()


@pytest.mark.parametrize("gradient", METHODS, ids=IDS)
@pytest.mark.parametrize("which", [0, 1], ids=["affine", "general"])
def test_an_empty_batch_can_be_differentiated(which, gradient):
    cell = _cells()[which]
    DEQLayer(cell, gradient=gradient)(torch.zeros(0, 4)).sum().backward()


def test_a_gradient_of_no_steps_is_differentiated_again():
    cell = _Recurrent()
    layer = DEQLayer(cell, gradient="unrolled")
    x = torch.zeros(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert cell.w.grad is not None
    assert not cell.w.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("which", [0, 1], ids=["affine", "general"])
@pytest.mark.parametrize("grad_mode", [False, True], ids=["no_grad", "grad"])
def test_a_reversible_state_is_not_the_memory_of_the_solution(grad_mode, which, dtype):
    layer = DEQLayer(_cells()[which].to(dtype).requires_grad_(False), gradient="reversible")
    with torch.set_grad_enabled(grad_mode):
        layer(torch.ones(2, 4, dtype=dtype)).zero_()
    assert layer.last_solution.value.any()
