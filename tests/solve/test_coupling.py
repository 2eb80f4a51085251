"""Samples that depend on each other raise at the first call in grad mode; others never do."""

import pytest
import torch
from coupled_cases import F64, TIGHT, contraction, coupled_graphs, graph
from torch import nn
from torch.utils import checkpoint

from fastdeq import CoupledSamplesError, fixed_point
from fastdeq.solve import coupling


def solve(f, z0, **options):
    return fixed_point(f, z0, **{"on_failure": "ignore", **options})


@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
@pytest.mark.parametrize("name", coupled_graphs())
def test_graphs(name, gradient):
    nodes, edges = coupled_graphs()[name]
    a, b = graph(nodes, *edges), torch.randn(nodes, 3, dtype=F64, requires_grad=True)
    with pytest.raises(CoupledSamplesError, match=r"independent.*batch_dim=None") as caught:
        solve(lambda z: a @ z + b, torch.zeros(nodes, 3, dtype=F64), gradient=gradient)
    if len(edges) == 1:
        (i, j) = edges[0]
        assert f"sample {i} depends on the state of sample {j} ({nodes} samples" in str(
            caught.value
        )
    z, solution = fixed_point(
        lambda z: a @ z + b, torch.zeros(nodes, 3, dtype=F64), batch_dim=None, **TIGHT
    )
    torch.testing.assert_close(z, torch.linalg.solve(torch.eye(nodes, dtype=F64) - a, b))
    assert solution.status.tolist() == [0]


@pytest.mark.parametrize("batch", [*range(2, 12), 37, 70, 71, 252, 253, 1000])
def test_some_set_separates_every_two_samples(batch):
    sets = coupling.separating_sets(batch)
    apart = (sets.unsqueeze(2) & ~sets.unsqueeze(1)).any(0)  # i is in a set that j is not in
    assert torch.equal(apart, ~torch.eye(batch, dtype=torch.bool))
    assert len(sets) <= {2: 2, 70: 8, 71: 9, 252: 10, 253: 11, 1000: 13}.get(batch, 8)


def test_nothing_has_to_require_grad():
    a = graph(5, (0, 1), (1, 0))
    with pytest.raises(ValueError, match="sample"):
        solve(lambda z: a @ z + 1, torch.zeros(5, 2, dtype=F64))
    with torch.no_grad():  # inference alone is not checked
        solve(lambda z: a @ z + 1, torch.zeros(5, 2, dtype=F64))


def test_a_vector():
    n, i = 7, torch.eye(7, dtype=F64)
    a, v = contraction(n), torch.randn(n, dtype=F64)
    b = torch.randn(n, dtype=F64, requires_grad=True)
    with pytest.raises(CoupledSamplesError, match="batch_dim=0"):
        solve(lambda z: a @ z + b, torch.zeros(n, dtype=F64))
    z, _ = fixed_point(lambda z: a @ z + b, torch.zeros(n, dtype=F64), batch_dim=None, **TIGHT)
    torch.testing.assert_close(z, torch.linalg.solve(i - a, b))
    (g,) = torch.autograd.grad(z @ v, b)
    torch.testing.assert_close(g, torch.linalg.solve((i - a).T, v))


def test_a_part_of_a_tuple_couples():
    mix = torch.full((6, 6), 1 / 12, dtype=F64)

    def f(state):
        u, v = state
        return 0.3 * u + 1, 0.3 * v + mix @ u[:, :2]

    start = (torch.zeros(6, 3, dtype=F64), torch.zeros(6, 2, dtype=F64))
    with pytest.raises(CoupledSamplesError):
        solve(f, start)


def test_the_dimension_that_counts_is_named():
    a = contraction(4)
    f = lambda z: torch.einsum("st,tbd->sbd", a, z) + 1  # noqa: E731
    start = torch.zeros(4, 3, 2, dtype=F64)
    for wrong in (0, (0, 1), (1, 0), (0, 2)):
        with pytest.raises(CoupledSamplesError, match="counted by batch_dim="):
            solve(f, start, batch_dim=wrong)
    for right in (1, 2, (1, 2), (2, 1), -1, None):
        solve(f, start, batch_dim=right)


class Attention(nn.Module):
    """Over the positions within each sample, masked."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, z):
        mask = nn.Transformer.generate_square_subsequent_mask(z.shape[1])
        return 0.1 * self.attention(z, z, z, attn_mask=mask, need_weights=False)[0] + 0.2


INDEPENDENT = {
    "convolution": (nn.Conv2d(4, 4, 3, padding=1), (5, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 4, 5, padding=2, groups=4), (3, 4, 8, 8)),
    "layer norm": (nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), (33, 6)),
    "group norm": (nn.GroupNorm(2, 4), (6, 4, 5, 5)),
    "batch norm in eval mode": (nn.BatchNorm1d(6).eval(), (7, 6)),
    "attention": (Attention(), (6, 5, 8)),
    "recurrent": (nn.LSTM(4, 4, batch_first=True), (5, 3, 4)),
    "dead": (nn.Sequential(nn.Linear(6, 6), nn.Threshold(100, 0.5)), (9, 6)),
    "checkpointed": (nn.Linear(6, 6), (4, 6)),
}


@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", INDEPENDENT)
def test_no_false_alarm(name, autocast, gradient):
    module, shape = INDEPENDENT[name]
    x = torch.randn(shape)

    def f(z):
        if name == "checkpointed":
            return 0.2 * checkpoint.checkpoint(module, z, use_reentrant=False) + x
        out = module(z)
        return 0.2 * (out[0] if isinstance(out, tuple) else out).float() + x

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        solve(f, torch.zeros(shape), gradient=gradient, max_iter=15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_states_of_every_dtype(dtype):
    w = contraction(6).to(dtype)
    solve(lambda z: torch.tanh(z @ w) + 1, torch.zeros(11, 6, dtype=dtype))
    with pytest.raises(CoupledSamplesError):
        solve(lambda z: torch.tanh(w @ z) + 1, torch.zeros(6, 6, dtype=dtype))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_samples_that_are_not_finite_prove_nothing(poison):
    w, c = contraction(5), torch.randn(9, 5, dtype=F64)
    c[4, 2] = poison
    solve(lambda z: z @ w + c, torch.zeros(9, 5, dtype=F64))
    scale = torch.ones(9, 1, dtype=F64)
    scale[3] = poison  # infinite times a cotangent of zero
    solve(lambda z: torch.where(scale.isfinite(), z @ w, z * scale), torch.ones(9, 5, dtype=F64))
    a = graph(9, (2, 3), (6, 8))  # and the finite ones are looked at all the same
    with pytest.raises(CoupledSamplesError, match="sample 7 depends on the state of sample 8"):
        solve(lambda z: a[[0, *range(8)]] @ (z * scale), torch.ones(9, 5, dtype=F64))


def test_a_cell_that_is_a_gradient_itself():
    """A step down an energy of each sample, whose derivative differentiates a gradient."""
    w = contraction(5)

    def descend(z, couple):
        with torch.enable_grad():
            z = z if z.requires_grad else z.requires_grad_()
            energy = (torch.log(torch.cosh(z @ w)).sum() + 0.5 * (z - 1).pow(2).sum()) / 2
            energy = energy + couple * z.sum(0).pow(2).sum() / 50
            return z - torch.autograd.grad(energy, z, create_graph=True)[0]

    solve(lambda z: descend(z, 0), torch.zeros(8, 5, dtype=F64))
    _, solution = solve(lambda z: 1.0 * descend(z, 0), torch.zeros(8, 5, dtype=F64), tol=1e-9)
    assert solution.converged.all()
    with pytest.raises(CoupledSamplesError):
        solve(lambda z: descend(z, 1), torch.zeros(8, 5, dtype=F64))


def test_a_second_derivative():
    w, c = contraction(4), torch.randn(6, 4, dtype=F64, requires_grad=True)
    z, _ = fixed_point(lambda z: torch.tanh(z @ w + c), torch.zeros(6, 4, dtype=F64), **TIGHT)
    (g,) = torch.autograd.grad(z.pow(2).sum(), c, create_graph=True)
    (h,) = torch.autograd.grad(g.pow(2).sum(), c)
    assert h.isfinite().all()


def test_the_random_state_stays_as_it_is():
    w = contraction(4)
    before = torch.get_rng_state()
    solve(lambda z: z @ w + 1, torch.zeros(9, 4, dtype=F64))
    assert torch.equal(before, torch.get_rng_state())


class NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return 0.5 * z

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("no derivative")


def test_a_map_without_a_derivative_still_has_a_solution():
    z, _ = fixed_point(lambda z: NoDerivative.apply(z) + 1, torch.zeros(4, 3))
    torch.testing.assert_close(z, torch.full((4, 3), 2.0), rtol=1e-3, atol=0)
    c = torch.ones(4, 3)
    for cut in (lambda z: c, lambda z: 0.5 * z.detach() + c, lambda z: c + 0 * z.new_ones(4, 3)):
        solve(cut, torch.zeros(4, 3))


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (4, 0), (0, 0)])
def test_nothing_to_look_at(shape):
    solve(lambda z: 0.5 * z + z.sum(0), torch.zeros(shape), max_iter=5)
