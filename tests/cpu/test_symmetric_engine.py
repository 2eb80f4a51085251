"""Symmetric weights in the engine: triangles read where they lie, packed weights passed to solves
in both directions, the symmetric part as an operator, and what is refused."""

import pytest
import torch
from engine_cases import Adjoint, Call, Forward
from symmetric_cases import adjoint_at, relative_residual, symmetric_cell, symmetric_weight

from fastdeq import AffineCell, DEQLayer, fixed_point
from fastdeq.backends import extension
from fastdeq.ops import (
    symmetric_part,
)
from fastdeq.solution import Status
from fastdeq.solvers import MINRES, Anderson, Energy, HeavyBall, Picard

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
TOL = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def forward(case, solver, symmetric=True, precision="float32", tol=None, max_iter=500, packed=None):
    tol = TOL[case.injection.dtype] if tol is None else tol
    call = Call(solver, tol, max_iter, precision)
    return torch.ops.fastdeq.solve_affine(*case.arguments(call, "cpp", True, symmetric, packed))


def adjoint(case, solver, packed=None, symmetric=True, precision="float32", max_iter=500):
    call = Call(solver, TOL[case.grad.dtype], max_iter, precision)
    return torch.ops.fastdeq.solve_affine_adjoint(*case.arguments(call, "cpp", packed, symmetric))


def pack(weight, precision="float32"):
    return torch.ops.fastdeq.pack_weight(weight, precision)


@dtypes
@pytest.mark.parametrize("size", [512, 513, 700, 1023])
@pytest.mark.parametrize("batch", [1, 2])
def test_triangles_give_what_packed_weights_give(batch, size, dtype, threads):
    # Of the radius 0.9 by the semicircle law: eigenvalues would take longer than the test.
    a = torch.randn(size, size)
    w = ((a + a.t()) * (0.9 / (8 * size) ** 0.5)).to(dtype)
    c = torch.randn(batch, size, dtype=dtype)
    for weight in (w, w.t()):
        case = Forward(weight, c)
        for updates in (1, 2):  # before differences can grow
            one, other = (
                forward(case, Picard(), symmetric, tol=0.0, max_iter=updates)
                for symmetric in (True, False)
            )
            unit = torch.finfo(dtype).eps / 2
            bound = updates * 2 * case.rounding(other[0], unit) * 1.5
            assert ((one[0].double() - other[0].double()).norm(dim=1) <= bound).all()
        z = forward(case, Energy(momentum=True))
        assert (z[1] == Status.CONVERGED).all()
        noise = case.rounding(z[0], torch.finfo(dtype).eps / 2) / z[0].double().norm(dim=1)
        assert (relative_residual(case, z[0]) <= TOL[dtype] + noise).all()
        back = adjoint_at(case, z[0])
        q = adjoint(back, MINRES(momentum=True), pack(weight))
        assert (q[1] == Status.CONVERGED).all()
        value = q[0].double() / back.scale()
        f = back.step(value)
        noise = back.rounding(value, torch.finfo(dtype).eps / 2)
        assert ((f - value).norm(dim=1) <= TOL[dtype] * f.norm(dim=1) * 1.01 + noise).all()


@pytest.mark.parametrize("solver", [Picard(), Anderson(), HeavyBall(), Energy()], ids=repr)
def test_every_solver_with_triangles(solver):
    case = symmetric_cell(2, 520, 0.9, torch.float64)
    one, other = forward(case, solver), forward(case, solver, symmetric=False)
    assert torch.equal(one[1], other[1])
    assert (one[2] - other[2]).abs().max() <= 1
    torch.testing.assert_close(one[0], other[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(one[5], other[5], rtol=1e-7, atol=1e-7)


def test_the_lower_triangle_is_not_read():
    """So that the other tests do test triangles: NaN there goes unnoticed."""
    w = symmetric_weight(512, 0.9, torch.float32)
    half = torch.where(torch.ones_like(w).triu().bool(), w, torch.nan)
    case = Forward(half, torch.randn(2, 512))
    outputs = forward(case, Picard())
    assert (outputs[1] == Status.CONVERGED).all()
    case = Forward(w, case.injection)
    noise = case.rounding(outputs[0], 2**-24) / outputs[0].double().norm(dim=1)
    assert (relative_residual(case, outputs[0]) <= 1e-5 + noise).all()
    bad = forward(Forward(half, torch.randn(3, 512)), Picard())
    assert (bad[1] == Status.NONFINITE).all()


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 64, 100, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_symmetric_part(dtype, size):
    wide = torch.randn(2 * size + 1, 3 * size).to(dtype)
    for a in (
        torch.randn(size, size).to(dtype),
        torch.randn(size, size).to(dtype).t(),
        wide[1 : 2 * size : 2, ::3],
        torch.randn(1, size).to(dtype).expand(size, size),
    ):
        part = torch.ops.fastdeq.symmetric_part(a)
        assert torch.equal(part, part.t())
        assert torch.equal(part, symmetric_part.reference(a))
        assert part.is_contiguous()
        assert part.dtype == dtype


def test_symmetric_part_is_differentiable_and_registered():
    a = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    op = torch.ops.fastdeq.symmetric_part
    assert torch.autograd.gradcheck(op, (a,))
    assert torch.autograd.gradgradcheck(op, (a,))
    for example in (a, a.detach().t(), a.detach().bfloat16(), torch.randn(40, 40)):
        torch.library.opcheck(op.default, (example,))
    threaded = torch.randn(300, 300)
    torch.set_num_threads(2)
    try:
        assert torch.equal(op(threaded), symmetric_part.reference(threaded))
    finally:
        torch.set_num_threads(1)
    with pytest.raises(RuntimeError, match="square"):
        op(torch.ones(2, 3))


@pytest.mark.parametrize(("batch", "size"), [(3, 17), (1, 512), (0, 17)])
@pytest.mark.parametrize("solver", [Energy(momentum=True), HeavyBall(), Picard()], ids=repr)
def test_opcheck_of_the_forward_solve(solver, batch, size):
    w = torch.eye(size) / 2
    case = Forward(w, torch.randn(batch, size))
    engine = "cpp" if batch else "reference"  # as a layer has it
    for packed in (None, pack(w, "auto")):
        arguments = case.arguments(Call(solver, 1e-4, 20, "auto"), engine, True, True, packed)
        torch.library.opcheck(torch.ops.fastdeq.solve_affine.default, arguments)


@pytest.mark.parametrize("solver", [MINRES(momentum=True), HeavyBall()], ids=repr)
def test_opcheck_of_the_adjoint_solve(solver):
    case = symmetric_cell(3, 17, 0.9, torch.float32)
    back = Adjoint(case.weight, torch.rand(3, 17), torch.randn(3, 17))
    for packed in (None, pack(case.weight, "auto")):
        call = Call(solver, 1e-4, 20, "auto")
        op = torch.ops.fastdeq.solve_affine_adjoint.default
        torch.library.opcheck(op, back.arguments(call, "cpp", packed, True))


@pytest.mark.parametrize("batch", [1, 5])
def test_compiled_layer(fresh_compiler, batch):
    size = 512 if batch == 1 else 24
    cell = AffineCell(6, size, weight="symmetric", scale=0.8, dtype=torch.float64)
    layer = DEQLayer(cell, tol=1e-9, on_failure="ignore")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(batch, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), (x, cell.weight.weight))
    actual = torch.autograd.grad(compiled(x).square().sum(), (x, cell.weight.weight))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("activation", ["tanh", "relu", "softplus"])
def test_the_general_path_agrees(activation):
    cell = AffineCell(6, 20, activation=activation, weight="symmetric", scale=0.7).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    options = {"tol": 1e-11, "max_iter": 400}
    fused = DEQLayer(cell, **options)(x)
    plain, _ = fixed_point(lambda z: cell(z, x), torch.zeros(4, 20).double(), **options)
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)
    (grad,) = torch.autograd.grad(fused.square().sum(), cell.weight.weight)
    (expected,) = torch.autograd.grad(plain.square().sum(), cell.weight.weight)
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("weight", "activation", "missing"),
    [
        ("dense", "tanh", "symmetric"),
        ("orthogonal", "tanh", "symmetric"),
        ("symmetric", "gelu", "monotone"),
    ],
)
@pytest.mark.parametrize("options", [{"solver": "energy"}, {"adjoint": "minres"}], ids=str)
def test_solvers_that_need_more_than_the_cell_has(options, weight, activation, missing):
    cell = AffineCell(3, 4, activation=activation, weight=weight, scale=0.5)
    with pytest.raises(ValueError, match=f"needs an AffineCell .*not known to be {missing}"):
        DEQLayer(cell, **options)(torch.randn(2, 3))
    w = torch.eye(4, requires_grad=True)
    with pytest.raises(ValueError, match="needs an AffineCell"):
        fixed_point(lambda z: torch.tanh(z @ w) / 2, torch.zeros(2, 4), **options)


def test_names_that_are_for_one_direction_only():
    cell = AffineCell(3, 4, weight="symmetric", scale=0.5)
    with pytest.raises(ValueError, match="'minres'"):
        DEQLayer(cell, solver="minres")
    with pytest.raises(ValueError, match="'energy' solves forward problems only"):
        DEQLayer(cell, adjoint="energy")
    with pytest.raises(ValueError, match="'energy' solves forward problems only"):
        DEQLayer(cell, adjoint=Energy())
    with pytest.raises(ValueError, match="'minres' solves the linear system of the gradient only"):
        DEQLayer(cell, solver=MINRES())
    hooked = AffineCell(3, 4, weight="symmetric", scale=0.5)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="solved as one"):
        DEQLayer(hooked, solver="energy")(torch.randn(2, 3))


def test_a_certified_solve_compiles(fresh_compiler):
    certified = {"solver": Picard(fixed_iterations="certified"), "adjoint": "neumann"}
    layer = DEQLayer(AffineCell(4, 16, weight="orthogonal", scale=0.8), **certified)
    x = torch.randn(3, 4)
    z = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(z, layer(x))
