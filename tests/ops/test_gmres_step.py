"""The C++ step of GMRES against its specification."""

import pytest
import torch

from fastdeq.backends import extension
from fastdeq.solvers.base import Problem
from fastdeq.solvers.gmres import GMRES, gmres_step

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)
FIELDS = ("basis", "hessenberg", "null", "beta", "step", "start")


def begun(matrix, rhs, restart, implementation, max_iter=40):
    problem = Problem(1e-6, 0.0, max_iter, None, implementation)
    point = torch.zeros_like(rhs)
    return GMRES(restart), GMRES(restart).init(point, problem), point


def evaluated(matrix, rhs, point):
    return rhs + torch.einsum("bij,bj->bi", matrix, point)


def system(batch, size, dtype, radius=0.8):
    matrix = torch.randn(batch, size, size, dtype=torch.float64)
    matrix *= radius / matrix.norm(dim=(1, 2), keepdim=True) * size**0.25
    return matrix.to(dtype), torch.randn(batch, size, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "restart"), [(5, 33, 4), (1, 1, 3), (3, 600, 20), (7, 2, 5), (40, 65, 1)]
)
def test_steps_are_those_of_the_specification(batch, size, restart, dtype):
    """Both take the same steps from the same state. A step's rounding errors are those of sums of n
    products, a few eps; a direction is w / |w|, which magnifies them by |column| / |w|. The basis
    of a matrix of norm below 1 keeps |w| above some 1e-2 for these few columns, except where the
    Krylov space is exhausted: there only the flag and the iterate are compared."""
    matrix, rhs = system(batch, size, dtype)
    _, state, point = begun(matrix, rhs, restart, torch.ops.fastdeq.gmres_step)
    own = state.space
    running = torch.rand(batch) < 0.8
    running[0] = True
    eps = torch.finfo(dtype).eps
    for k in range(12):
        value = evaluated(matrix, rhs, point)
        norm = (value - point).norm(dim=1)
        if k == 0:
            offset, scale = value, value.norm(dim=1)
        theirs = {name: getattr(own, name).clone() for name in FIELDS}
        unused = torch.arange(restart + 1) > own.step.unsqueeze(1)
        theirs["basis"][unused] = 0  # C++ does not look at what an earlier cycle left there
        others = (offset, scale, point, value, norm, running)
        how = (min(k, restart), 1e-6, 0.0, k == 11)
        ours = [getattr(own, name) for name in FIELDS]
        following, iterate = torch.ops.fastdeq.gmres_step(*ours, *others, *how)
        expected, expected_iterate = gmres_step(*theirs.values(), *others, *how)
        assert torch.equal(iterate[running], expected_iterate[running])
        assert torch.equal(own.step[running], theirs["step"][running])
        regular = running & theirs["null"].isfinite().all(1)
        length = theirs["hessenberg"].diagonal(offset=-1, dim1=1, dim2=2)
        least = torch.where(length > 0, length, 1.0).amin(1)
        regular &= (least > 1e-2) | iterate
        bound = 100 * eps * (1 + size**0.5) / least.clamp(max=1.0).to(dtype)
        size_of_each = 1 + expected.abs().amax(1)
        error = (following - expected).abs().amax(1) / size_of_each
        assert (error[regular] <= bound[regular]).all()
        assert torch.equal(following[~running], point[~running])
        point = following
    assert iterate.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_strided_values_are_read_as_they_are(dtype):
    matrix, rhs = system(4, 9, dtype)
    results = []
    for layout in (lambda t: t, lambda t: t.t().contiguous().t()):
        solver, state, point = begun(matrix, rhs, 3, torch.ops.fastdeq.gmres_step)
        running = torch.ones(4, dtype=torch.bool)
        for _ in range(9):
            value = evaluated(matrix, rhs, point)
            norm = (value - point).norm(dim=1)
            point = solver.step(state, layout(point), layout(value), norm, running).point
        results.append(point)
    assert torch.equal(*results)


def test_opcheck_and_shapes():
    matrix, rhs = system(3, 6, torch.float64)
    _, state, point = begun(matrix, rhs, 4, torch.ops.fastdeq.gmres_step)
    own = state.space
    arguments = [getattr(own, name) for name in FIELDS]
    running = torch.ones(3, dtype=torch.bool)
    arguments += [rhs, rhs.norm(dim=1), point, rhs, rhs.norm(dim=1), running, 0, 1e-6, 0.0, False]
    torch.library.opcheck(torch.ops.fastdeq.gmres_step, tuple(arguments))
    arguments[4] = own.step.int()
    with pytest.raises(RuntimeError, match="shapes or dtypes"):
        torch.ops.fastdeq.gmres_step(*arguments)
