"""States that are structures of tensors, against the same solve with one tensor, and what is said
where a cell returns another structure."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from fastdeq import DEQLayer, fixed_point
from fastdeq.diagnostics import spectral_radius

F64 = torch.float64
Pair = namedtuple("Pair", "u v")

# Each puts two tensors together, and takes them apart.
STRUCTURES = {
    "tuple": (lambda a, b: (a, b), lambda s: (s[0], s[1])),
    "list": (lambda a, b: [a, b], lambda s: (s[0], s[1])),
    "dict": (lambda a, b: {"u": a, "v": b}, lambda s: (s["u"], s["v"])),
    "ordered": (lambda a, b: OrderedDict(v=a, u=b), lambda s: (s["v"], s["u"])),
    "named": (Pair, lambda s: (s.u, s.v)),
    "nested": (lambda a, b: {"x": (a, [b])}, lambda s: (s["x"][0], s["x"][1][0])),
    "of one": (lambda a, b: {"x": torch.cat([a, b], 1)}, lambda s: s["x"].split([4, 2], 1)),
}


def coupled():
    """A contraction of rows of 6, in two parts of 4 and 2."""
    w = torch.randn(6, 6, dtype=F64)
    return 0.6 * w / torch.linalg.matrix_norm(w, 2)


@pytest.mark.parametrize("options", [{}, {"compact": True}, {"solver": "picard"}], ids=str)
@pytest.mark.parametrize("name", STRUCTURES)
def test_equal_to_the_solve_with_one_tensor(name, options):
    join, split = STRUCTURES[name]
    w = coupled().requires_grad_()
    x = (
        torch.randn(5, 6, dtype=F64) * torch.logspace(-3, 1, 5, dtype=F64)[:, None]
    ).requires_grad_()

    def cell(state, x):
        z = torch.tanh(torch.cat(split(state), 1) @ w + x)
        return join(z[:, :4], z[:, 4:])

    start = join(torch.zeros(5, 4, dtype=F64), torch.zeros(5, 2, dtype=F64))
    layer = DEQLayer(cell, tol=1e-10, max_iter=300, **options)
    state = layer(x, z0=start)
    assert tree_flatten(state)[1] == tree_flatten(start)[1]
    value = layer.last_solution.value
    assert tree_flatten(value)[1] == tree_flatten(start)[1]
    assert layer.last_solution.converged.all()
    z = torch.cat(split(state), 1)
    torch.testing.assert_close(torch.cat(split(value), 1), z.detach(), rtol=0, atol=0)
    alone = DEQLayer(lambda z, x: torch.tanh(z @ w + x), tol=1e-10, max_iter=300)(x)
    torch.testing.assert_close(z, alone, rtol=1e-8, atol=1e-8)
    found, expected = (torch.autograd.grad(s.pow(2).sum(), (w, x)) for s in (z, alone))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", STRUCTURES)
def test_gradients_of_first_and_second_order(name):
    join, split = STRUCTURES[name]
    w, x = coupled().requires_grad_(), torch.randn(2, 6, dtype=F64, requires_grad=True)

    def solved(w, x):
        def f(state):
            z = torch.tanh(torch.cat(split(state), 1) @ w + x)
            return join(z[:, :4], z[:, 4:])

        start = join(torch.zeros(2, 4, dtype=F64), torch.zeros(2, 2, dtype=F64))
        return tuple(split(fixed_point(f, start, tol=1e-13, max_iter=300)[0]))

    assert torch.autograd.gradcheck(solved, (w, x))
    assert torch.autograd.gradgradcheck(solved, (w, x), atol=1e-4, nondet_tol=1e-8)


def test_a_dict_may_come_back_in_another_order():
    f = lambda s: {"v": 0.5 * s["v"] + 1, "u": 0.5 * s["u"]}  # noqa: E731
    z, _ = fixed_point(f, {"u": torch.ones(2, 1), "v": torch.zeros(2, 3)})
    torch.testing.assert_close(z["v"], torch.full((2, 3), 2.0), rtol=1e-3, atol=0)
    assert list(z) == ["u", "v"]


def test_a_sample_that_is_not_finite_is_set_aside_in_each_part():
    layer = DEQLayer(lambda s, x: {"u": (0.5 * s["u"][0] + x + 1,)}, on_failure="ignore")
    x = torch.ones(3, 2)
    x[1] = torch.nan
    z = layer(x, z0={"u": (torch.zeros(3, 2),)})["u"][0]
    torch.testing.assert_close(z[1], torch.zeros(2), rtol=0, atol=0)
    torch.testing.assert_close(z[0], torch.full((2,), 4.0), rtol=1e-3, atol=0)
    assert layer.last_solution.nonfinite.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("start", "returned", "named"),
    [
        ({"u": 1}, ({"w": 1}), ["{'w': Tensor}", "{'u': Tensor}"]),
        ({"u": 1}, (1, 1), ["(Tensor, Tensor)", "{'u': Tensor}"]),
        (Pair(1, 1), (1, 1), ["(Tensor, Tensor)", "Pair(u=Tensor, v=Tensor)"]),
        (1, (1,), ["(Tensor,)", "Tensor;"]),
        (1, {"u": 1}, ["{'u': Tensor}", "Tensor;"]),
        ((1, [1]), (1, (1,)), ["(Tensor, (Tensor,))", "(Tensor, [Tensor])"]),
        ((1, 1), (1, None), ["(Tensor, NoneType)", "(Tensor, Tensor)"]),
        ({"u": 1}, {"u": 0.5}, ["{'u': float}", "{'u': Tensor}"]),
    ],
    ids=str,
)
def test_another_structure_is_an_error_that_names_both(start, returned, named):
    def filled(leaf):
        return torch.zeros(2, 3) if leaf == 1 else leaf

    start, returned = tree_map(filled, start), tree_map(filled, returned)
    with pytest.raises(TypeError) as error:
        fixed_point(lambda z: returned, start)
    for text in (f"returned {named[0]}", f"state {named[1]}"):
        assert text in str(error.value)


@pytest.mark.parametrize("start", [{}, (), {"u": 3.0}, (torch.zeros(2), None), "u"], ids=str)
def test_a_start_without_tensors_alone_is_an_error(start):
    with pytest.raises(TypeError, match="structure of tensors"):
        fixed_point(lambda z: z, start)


def test_initial_state_and_diagnostics():
    class Cell(nn.Module):
        def initial_state(self, x):
            return Pair(torch.zeros_like(x), torch.zeros_like(x[:, :1]))

        def forward(self, s, x):
            return Pair(0.5 * s.u + x, 0.25 * s.v)

    x = torch.ones(3, 2)
    assert type(DEQLayer(Cell())(x)) is Pair
    radius = spectral_radius(Cell(), x, tol=1e-3).value
    torch.testing.assert_close(radius, torch.full((3,), 0.5), rtol=1e-3, atol=0)


def test_transforms_of_a_structure():
    """Derivatives in forward mode and of torch.func."""

    def solved(x):
        f = lambda s: {"u": 0.5 * s["u"] + x, "v": [0.5 * s["v"][0] + s["u"]]}  # noqa: E731
        start = {"u": torch.zeros(2, 3, dtype=F64), "v": [torch.zeros(2, 3, dtype=F64)]}
        return fixed_point(f, start, tol=1e-12, max_iter=300)[0]["v"][0].pow(2).sum()

    x = torch.randn(2, 3, dtype=F64)  # u = 2 x, v = 4 x
    torch.testing.assert_close(torch.func.grad(solved)(x), 32 * x, rtol=1e-9, atol=1e-12)
    _, tangent = torch.func.jvp(solved, (x,), (x,))
    torch.testing.assert_close(tangent, 32 * x.pow(2).sum(), rtol=1e-9, atol=0)
