"""Keyword arguments of a layer go to its cell: their values, gradients, and what is left out."""

import inspect

import pytest
import torch
from torch import nn

from fastdeq import AffineCell, DEQLayer

F64 = torch.float64
TIGHT = {"tol": 1e-12, "max_iter": 300}


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        w = torch.randn(4, 4, dtype=F64)
        self.w = nn.Parameter(0.6 * w / torch.linalg.matrix_norm(w, 2))
        self.calls = []

    def forward(self, z, inputs, mask=None, *, scale=1.0, extra=None, table=None, **others):
        self.calls.append((len(z), extra, others))
        y = scale * torch.tanh(z @ self.w + inputs)
        if table is not None:
            y = y + table["bias"][0]
        return y if mask is None else y * mask


def unrolled(cell, x, **keywords):
    z = torch.zeros_like(x)
    for _ in range(150):
        z = cell(z, x, **keywords)
    return z


@pytest.mark.parametrize("compact", [False, True, (0, 0, None, None)], ids=str)
def test_values_and_gradients_are_those_of_the_unrolled_iteration(compact):
    cell = Cell()
    x = torch.randn(6, 4, dtype=F64) * torch.logspace(-4, 1, 6, dtype=F64)[:, None]
    tensors = {
        "mask": torch.rand(6, 4, dtype=F64),
        "scale": torch.tensor(0.9, dtype=F64),
        "bias": torch.randn(4, dtype=F64),
    }
    leaves = [cell.w, x.requires_grad_(), *(t.requires_grad_() for t in tensors.values())]
    keywords = {
        "table": {"bias": [tensors["bias"]]},  # in another order than the cell's
        "scale": tensors["scale"],
        "mask": tensors["mask"],
    }
    layer = DEQLayer(cell, compact=compact, **TIGHT)
    z = layer(x, **keywords)
    assert layer.last_solution.converged.all()
    expected = unrolled(cell, x, **keywords)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(z.pow(2).sum(), leaves)
    for one, other in zip(found, torch.autograd.grad(expected.pow(2).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    if compact:
        assert layer.last_solution.path == "general, finished samples left out"
        assert min(count for count, *_ in cell.calls) < 6


def test_gradcheck_in_first_and_second_order():
    w = 0.4 * torch.eye(3, dtype=F64)
    layer = DEQLayer(lambda z, x, *, m, s: torch.tanh(z @ (w * s["s"]) + x) * m, **TIGHT)
    x, m = (torch.randn(2, 3, dtype=F64, requires_grad=True) for _ in range(2))
    s = torch.tensor(0.7, dtype=F64, requires_grad=True)
    solved = lambda x, m, s: layer(x, m=m, s={"s": s})  # noqa: E731
    assert torch.autograd.gradcheck(solved, (x, m, s))
    assert torch.autograd.gradgradcheck(solved, (x, m, s), atol=1e-4)


def test_what_is_no_tensor_passes_through_untouched():
    cell, thing = Cell(), object()
    layer = DEQLayer(cell)
    x = torch.ones(2, 4, dtype=F64)
    layer(x, None, extra=thing, name="a", flag=True, start=None)
    assert all(extra is thing for _, extra, _ in cell.calls)
    assert cell.calls[-1][2] == {"name": "a", "flag": True, "start": None}
    seen = []
    DEQLayer(lambda z, x, *more: (seen.extend(more), 0.5 * z + x)[1])(x, "mean", thing, 3)
    assert seen[:3] == ["mean", thing, 3]


def test_x_by_the_name_that_the_cell_gives_it():
    x, w = torch.randn(3, 4, dtype=F64), torch.randn(4, dtype=F64)
    expected = DEQLayer(lambda z, x: 0.5 * z + x, **TIGHT)(x)
    for cell, keywords in [
        (lambda z, x: 0.5 * z + x, {"x": x}),
        (lambda z, u: 0.5 * z + u, {"u": x}),
        (lambda z, u: 0.5 * z + u, {"x": x}),
        (lambda z, *, x: 0.5 * z + x, {"x": x}),
        (lambda z, *, u, k: 0.5 * z + u * k, {"k": 1, "u": x}),
        (lambda z, u, x: 0.5 * z + u + 0 * x, {"x": w, "u": x}),
        (lambda z, **all: 0.5 * z + all["x"], {"x": x}),
        (lambda z, *all: 0.5 * z + all[0], {"x": x}),
    ]:
        torch.testing.assert_close(DEQLayer(cell, **TIGHT)(**keywords), expected)
    bad = x.clone()
    bad[1, 0] = torch.nan
    layer = DEQLayer(lambda z, *, u: 0.5 * z + u, on_failure="ignore")
    assert layer(u=bad)[1].abs().sum() == 0
    assert layer.last_solution.nonfinite.tolist() == [False, True, False]
    affine = DEQLayer(AffineCell(4, 5, dtype=F64))
    torch.testing.assert_close(affine(x=x), affine(x), rtol=0, atol=0)
    assert affine.last_solution.path == "fused"
    assert list(inspect.signature(affine.forward).parameters) == ["x", "context", "z0", "keywords"]


@pytest.mark.parametrize("cell", [AffineCell(3, 4), lambda z, x: z, lambda z, u: z], ids="aeu")
def test_no_x_is_an_error(cell):
    with pytest.raises(TypeError, match=r"needs its input: layer\(x, ...\), or by name"):
        DEQLayer(cell)()
    with pytest.raises(TypeError, match="needs its input"):
        DEQLayer(cell)(z0=torch.zeros(2, 4))


def test_keywords_that_the_cell_does_not_take():
    x = torch.zeros(2, 4)
    for layer in (DEQLayer(AffineCell(4, 4)), DEQLayer(AffineCell(4, 4), solver="picard")):
        with pytest.raises(TypeError, match="takes no keyword arguments, got 'mask'"):
            layer(x, mask=x)
    with pytest.raises(TypeError, match=r"calls <lambda>\(z, x, start=\.\.\.\).*z0="):
        DEQLayer(lambda z, x: z)(x, start=x)
    with pytest.raises(ValueError, match="1 entries for 2 arguments"):
        DEQLayer(lambda z, x, m: z + x * m, compact=(0,))(x, m=x)
    with pytest.raises(ValueError, match=r"argument 'm' of the cell.*without 2 samples"):
        DEQLayer(lambda z, x, m: z + x * m, compact=(0, 0))(x, m=torch.ones(3, 4))

    class Masked(AffineCell):
        def forward(self, z, x, mask=1.0):
            return super().forward(z, x) * mask

    layer = DEQLayer(Masked(4, 4))
    torch.testing.assert_close(layer(x, mask=0.0), torch.zeros(2, 4))


def test_keywords_in_compiled_programs(fresh_compiler):
    x = torch.randn(2, 4)
    affine = DEQLayer(AffineCell(4, 4))
    whole = torch.compile(lambda x: affine(x=x), fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(x), affine(x))
    layer = DEQLayer(lambda z, x, m=1.0: 0.5 * z + x * m)
    part = torch.compile(lambda x, m: layer(x, m=m) + 1, backend="eager")
    torch.testing.assert_close(part(x, x), layer(x, m=x) + 1)
