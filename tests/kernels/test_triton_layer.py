"""``DEQLayer(backend="triton")`` from end to end, and the operators behind it."""

import pytest
import torch
from engine_cases import Adjoint, Call, Forward

from fastdeq import AffineCell, BackendError, DEQLayer, Neumann, Picard

CELLS = [("dense", 12, "tanh"), ("symmetric", 9, "tanh"), ("orthogonal", 17, "relu")]


@pytest.mark.parametrize("precision", ["auto", "mixed"])
@pytest.mark.parametrize(("weight", "features", "activation"), CELLS, ids=str)
def test_values_and_gradients_are_those_of_plain_pytorch(
    weight, features, activation, precision, device
):
    """Both solve to 1e-5 where maps contract by 0.7 at most: 2e-5 / 0.3, and rounding."""
    cell = AffineCell(4, features, activation=activation, weight=weight, scale=0.6).to(device)
    x = torch.randn(5, 4, device=device)
    found = {}
    for backend in ("triton", "reference"):
        allowed = precision if backend == "triton" else "auto"
        layer = DEQLayer(cell, backend=backend, tol=1e-5, precision=allowed)
        z = layer(x)
        z.square().sum().backward()
        assert layer.last_solution.converged.all()
        assert layer.last_adjoint_solution.converged.all()
        found[backend] = [z.detach(), *(p.grad.clone() for p in cell.parameters())]
        cell.zero_grad()
    for actual, expected in zip(found["triton"], found["reference"], strict=True):
        assert (actual - expected).norm() <= 2e-4 * expected.norm()


def test_what_triton_does_not_have_raises_in_the_forward_pass(device):
    cell = AffineCell(3, 5, scale=0.5).to(device)
    layer = DEQLayer(cell, backend="triton", adjoint="gmres")
    with pytest.raises(BackendError, match=r"adjoint solve.*gmres"):
        layer(torch.randn(2, 3, device=device))
    with pytest.raises(BackendError, match="float64"):
        DEQLayer(cell.double(), backend="triton")(torch.randn(2, 3, device=device).double())


def test_a_backend_in_the_place_of_an_engine_is_chosen_when_the_operator_runs(device):
    """As a compiled layer on a GPU has it, whose batch may be symbolic."""
    case = Forward(*(t.to(device) for t in (0.1 * torch.randn(7, 7), torch.randn(3, 7))))
    found, expected = (case.run(Call(Picard()), engine) for engine in ("triton", "whole"))
    assert torch.equal(found.value, expected.value)


def test_an_empty_batch_gives_an_empty_result(device):
    layer = DEQLayer(AffineCell(3, 5, scale=0.5).to(device), backend="triton")
    z = layer(torch.randn(0, 3, device=device))
    z.sum().backward()
    assert z.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_are_what_their_schemas_say(dtype, device):
    w = (0.1 * torch.randn(5, 5, device=device)).to(dtype)
    c = torch.randn(3, 5, device=device).to(dtype)
    checks = ("test_schema", "test_faketensor")
    for engine in ("whole", "steps"):
        forward = Forward(w, c).arguments(Call(Picard(), 1e-3, 20), engine)
        op = torch.ops.fastdeq.solve_affine.default
        torch.library.opcheck(op, forward, test_utils=checks)
        adjoint = Adjoint(w, torch.rand_like(c), c).arguments(Call(Neumann(), 1e-3, 20), engine)
        op = torch.ops.fastdeq.solve_affine_adjoint.default
        torch.library.opcheck(op, adjoint, test_utils=checks)
