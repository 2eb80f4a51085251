"""``torch.compile(fullgraph=True)`` of layers around affine cells."""

import pytest
import torch
from torch import nn

from fastdeq import AffineCell, DEQLayer, Neumann, Orthogonal, Picard, Symmetric

pytestmark = pytest.mark.usefixtures("fresh_compiler")
FAMILIES = ("dense", "orthogonal", "symmetric")
CERTIFIED = {
    "solver": Picard(fixed_iterations="certified"),
    "adjoint": Neumann(fixed_iterations="certified"),
}


def make(weight="dense", **options):
    cell = AffineCell(5, 8, weight=weight, scale=0.6, dtype=torch.float64)
    return DEQLayer(cell, **{"tol": 1e-10, "max_iter": 400, **options})


def check(layer, *args, backend="aot_eager", fullgraph=True, **keywords):
    """State and gradients of the compiled layer are those of the layer."""
    results = []
    for run in (layer, torch.compile(layer, fullgraph=fullgraph, backend=backend)):
        layer.zero_grad()
        z = run(*args, **keywords)
        z.square().sum().backward()
        results.append([z.detach(), *(p.grad.clone() for p in layer.parameters())])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("weight", FAMILIES)
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)], ids=str)
def test_leading_dimensions(weight, shape):
    check(make(weight), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("weight", FAMILIES)
def test_what_the_compiler_makes_of_it(weight):
    check(make(weight), torch.randn(4, 5, dtype=torch.float64), backend="inductor")


@pytest.mark.parametrize("weight", FAMILIES)
@pytest.mark.parametrize("gradient", ["one_step", "phantom"])
def test_gradients_of_the_cell_alone(weight, gradient):
    check(make(weight, gradient=gradient), torch.randn(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("gradient", ["truncated", "unrolled", "reversible"])
def test_gradients_that_follow_the_solve_end_the_graph(gradient):
    layer, x = make(gradient=gradient, tol=1e-5), torch.randn(4, 5, dtype=torch.float64)
    check(layer, x, fullgraph=False)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(layer, fullgraph=True, backend="eager")(x)


@pytest.mark.parametrize(
    "weight",
    [
        Orthogonal(8, 0.6, max_scale=0.9, dtype=torch.float64),
        Symmetric(8, 0.6, max_eigenvalue=0.7, dtype=torch.float64),
    ],
    ids=["learned scale", "bounded eigenvalues"],
)
def test_weights_with_options(weight):
    cell = AffineCell(5, 8, weight=weight, dtype=torch.float64)
    check(DEQLayer(cell, tol=1e-10), torch.randn(4, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        ("dense", {"adjoint_limit": 5.0}),
        ("dense", {"min_iter": 3}),
        ("dense", {"keep_solutions": 2}),
        ("dense", {"solver": "broyden", "adjoint": "bicgstab"}),
        ("dense", {"solver": "newton_krylov", "adjoint": "broyden"}),
        ("symmetric", {"solver": "energy", "adjoint": "minres"}),
        ("orthogonal", CERTIFIED),
    ],
    ids=lambda o: o if isinstance(o, str) else "-".join(o),
)
def test_options(weight, options):
    check(make(weight, **options), torch.randn(4, 5, dtype=torch.float64))


def test_a_start_and_x_by_keyword():
    x, start = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    check(make(), x=x)
    check(make(), x, z0=start)


def test_another_injection():
    layer = make()
    layer.cell.injection = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    check(layer, torch.randn(4, 5, dtype=torch.float64))


def test_without_gradients_and_for_any_batch():
    layer = make()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 7, 1):
        x = torch.randn(batch, 5, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(run(x), layer(x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("args", "keywords", "message"),
    [
        ((torch.zeros(4, 5, dtype=torch.float64),), {"mask": 1}, "no keyword arguments.*'mask'"),
        ((torch.zeros(4, 6, dtype=torch.float64),), {}, r"needs \(\.\.\., 5\)"),
        ((torch.zeros(4, 5),), {}, "float32 and the cell torch.float64"),
    ],
    ids=["keyword", "shape", "dtype"],
)
def test_the_message_of_a_call_that_does_not_fit_arrives(args, keywords, message):
    run = torch.compile(make(), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=message):
        run(*args, **keywords)
