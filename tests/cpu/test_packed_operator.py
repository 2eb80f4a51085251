"""Packed weights as the operator ``pack_weight`` returns them: what solves in both directions do
with them, and with buffers that do not fit."""

import pytest
import torch
from engine_cases import Adjoint, Call, Forward
from symmetric_cases import symmetric_cell

from fastdeq.backends import extension
from fastdeq.solvers import MINRES, Anderson, Energy, Neumann, Picard

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
@pytest.mark.parametrize("precision", ["float32", "auto", "mixed"])
@pytest.mark.parametrize("size", [1, 17, 64, 130, 300])
def test_a_packed_weight_is_that_which_a_solve_would_pack(size, precision, dtype, threads):
    if precision == "mixed" and (dtype == torch.float64 or not extension.has_low_precision):
        pytest.skip("there are no such products")
    case = symmetric_cell(9, size, 0.9, dtype)
    back = Adjoint(case.weight, torch.rand(9, size, dtype=dtype), torch.randn(9, size, dtype=dtype))
    packed = pack(case.weight, precision)
    wide = torch.empty(size, size + 3, dtype=dtype)[:, :size].copy_(case.weight)
    apart = torch.empty(size, 2 * size, dtype=dtype)[:, ::2].copy_(case.weight)
    for each in (packed, pack(case.weight.t(), precision), pack(wide, precision), pack(apart)):
        for solver in (Energy(momentum=True), Picard(), Anderson()):
            with_it = forward(case, solver, precision=precision, packed=each)
            for a, b in zip(with_it, forward(case, solver, precision=precision), strict=True):
                assert torch.equal(a, b)
        for solver in (MINRES(), Neumann(), Anderson()):
            with_it = adjoint(back, solver, each, precision=precision)
            for a, b in zip(with_it, adjoint(back, solver, precision=precision), strict=True):
                assert torch.equal(a, b)


def test_it_is_the_packed_weight_that_a_solve_reads():
    """Of another matrix, it shows: what is passed is used, not packed again."""
    case, other = symmetric_cell(9, 64, 0.9), symmetric_cell(9, 64, 0.9)
    back = Adjoint(case.weight, torch.rand(9, 64).double(), torch.randn(9, 64).double())
    mixed = adjoint(back, MINRES(), pack(other.weight))
    right = adjoint(Adjoint(other.weight, *back.tensors()[1:]), MINRES())
    assert torch.equal(mixed[0], right[0])
    ignored = adjoint(back, MINRES(), pack(other.weight), symmetric=False)
    assert torch.equal(ignored[0], adjoint(back, MINRES())[0])
    mixed = forward(case, Picard(), packed=pack(other.weight))
    right = forward(Forward(other.weight, case.injection), Picard())
    assert torch.equal(mixed[0], right[0])
    ignored = forward(case, Picard(), symmetric=False, packed=pack(other.weight))
    assert torch.equal(ignored[0], forward(case, Picard())[0])


def test_nothing_packed_is_read_where_the_triangle_is():
    case, other = symmetric_cell(2, 520, 0.9), symmetric_cell(2, 520, 0.9)
    with_it = forward(case, Picard(), packed=pack(other.weight))
    assert torch.equal(with_it[0], forward(case, Picard())[0])


def unfit_buffers(case):
    """What a packed weight of case, in float32 with full precision, is not."""
    size = case.weight.shape[0]
    right = pack(case.weight)
    smaller = symmetric_cell(9, size - 1, 0.9, torch.float32)
    buffers = {
        "of another dtype": pack(case.weight.double()),
        "of another size": pack(smaller.weight),
        "zeros": torch.zeros_like(right),
        "ones": torch.full_like(right, 255),
        "empty": right[:0],
        "shorter": right[:-1],
        "longer": torch.cat([right, right]),
        "strided": torch.stack([right, right], 1)[:, 0],
        "not bytes": right.to(torch.int8),
        "no buffer": None,
    }
    if extension.has_low_precision:
        buffers["of another precision"] = pack(case.weight, "mixed")
    return buffers


@pytest.mark.parametrize("size", [64, 520])
def test_buffers_that_do_not_fit_are_neither_read_nor_written(size):
    case = symmetric_cell(9, size, 0.9, torch.float32)
    back = Adjoint(case.weight, torch.rand(9, size), torch.randn(9, size))
    expected, state = adjoint(back, MINRES()), forward(case, Picard())
    for name, buffer in unfit_buffers(case).items():
        before = None if buffer is None else buffer.clone()
        outputs = adjoint(back, MINRES(), buffer)
        assert torch.equal(outputs[0], expected[0]), name
        outputs = forward(case, Picard(), packed=buffer)
        assert torch.equal(outputs[0], state[0]), name
        if before is not None:
            assert torch.equal(before, buffer), f"{name}: an input of the operator was written to"


@pytest.mark.parametrize("precision", ["auto", "float32", "mixed"])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65])
def test_opcheck_of_packing(size, precision):
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        w = torch.randn(size, size).to(dtype)
        op = torch.ops.fastdeq.pack_weight.default
        # Not all of the bytes are written, hence never the same.
        torch.library.opcheck(op, (w, precision), test_utils=utils)
    assert torch.ops.fastdeq.pack_weight(w.to("meta"), precision).numel() == 0


@pytest.mark.parametrize(
    ("weight", "precision", "message"),
    [
        (torch.ones(2, 3), "auto", "weight must be"),
        (torch.ones(3), "auto", "weight must be"),
        (torch.ones(2, 2).long(), "auto", "floating-point"),
        (torch.ones(2, 2), "half", "precision must be"),
    ],
)
def test_what_cannot_be_packed(weight, precision, message):
    with pytest.raises(RuntimeError, match=message):
        pack(weight, precision)
