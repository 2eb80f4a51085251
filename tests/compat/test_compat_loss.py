"""Losses, dropout and helpers of ``fastdeq.compat.torchdeq``, next to torchdeq's own."""

import pytest
import torch
from torch import nn

import fastdeq.compat.torchdeq as ours

theirs = pytest.importorskip("torchdeq")


@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("exp", {}),
        ("exp", {"gamma": 0.5}),
        ("linear", {}),
        ("linear", {"gamma": 0.5, "bias": 0.1}),
        ("own", {"power": 2}),
    ],
)
def test_corrections_are_the_same(name, options, returns):
    states, target, mask = [torch.randn(4, 3) for _ in range(3)], torch.randn(4, 3), torch.rand(4)
    found = []
    for package in (theirs, ours):
        package.register_weight_func("own", lambda n, k, power: (k + 1) ** power / n)

        def loss(z, y, m):
            return ((z - y).square().mean(1) * m).sum()

        found.append(
            package.fp_correction(
                loss, (states, target, [mask, 2 * mask]), name, returns, **options
            )
        )
    torch.testing.assert_close(found[1], found[0])


def test_constant_weights_need_no_gpu():
    states = [torch.ones(2), torch.full((2,), 2.0)]
    found = ours.fp_correction(torch.sum, (states,), "const", c=0.5, gamma=0.9)
    assert found.item() == 0.5 * (2 + 4)


@pytest.mark.parametrize("vecs", [1, 3])
def test_jac_reg_draws_the_same(vecs):
    weight = torch.randn(6, 6, requires_grad=True)
    found = []
    for package in (theirs, ours):
        z = torch.linspace(-1, 1, 24).reshape(4, 6).requires_grad_()
        torch.manual_seed(1)
        penalty = package.jac_reg(torch.tanh(z @ weight), z, vecs=vecs)
        found.append((penalty, torch.autograd.grad(penalty, weight)[0]))
    torch.testing.assert_close(found[1], found[0])


def test_power_method_of_real_and_complex_eigenvalues():
    """torchdeq's is right for the first alone."""
    symmetric = torch.diag(torch.tensor([0.9, -0.5, 0.3]))
    turn = 0.8 * torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.1]])
    for matrix, radius, packages in ((symmetric, 0.9, (theirs, ours)), (turn, 0.8, (ours,))):
        for package in packages:
            z = torch.randn(5, 3, requires_grad=True)
            vector, found = package.power_method(z @ matrix, z, n_iters=100)
            assert vector.shape == z.shape
            torch.testing.assert_close(found, torch.full((5,), radius), rtol=1e-3, atol=0)
    z = torch.randn(5, 3, requires_grad=True)
    assert (ours.power_method(0 * z, z)[1] == 0).all()


LAYERS = [
    ("VariationalDropout", (5, 3), {}),
    *((f"VariationalDrop{what}1d", (5, 4, 3), {}) for what in ("out", "Token")),
    *((f"VariationalDrop{what}2d", (5, 4, 3, 2), {}) for what in ("out", "Token")),
    *((f"VariationalDrop{what}3d", (5, 4, 3, 2, 2), {}) for what in ("out", "Token")),
]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("name", "shape", "options"), LAYERS)
def test_masks_are_the_same(name, shape, options, first):
    options = {} if name == "VariationalDropout" else {"token_first": first}
    x, found = torch.randn(shape), []
    for package in (theirs, ours):
        torch.manual_seed(2)
        layer = nn.Sequential(getattr(package, name)(0.4, **options))
        outputs = [layer(x), layer(x)]
        package.reset_dropout(layer)
        outputs += [layer(x), layer.eval()(x)]
        found.append(outputs)
    torch.testing.assert_close(found[1], found[0])
    assert not torch.equal(found[1][0], found[1][2])


def test_masks_follow_the_input():
    layer = ours.VariationalDropout(0.5)
    assert layer(torch.randn(4, 3, dtype=torch.float64)).dtype == torch.float64
    assert layer.mask.dtype == torch.float64
    assert ours.VariationalDropout(1.0)(torch.ones(3)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="reset_dropout"):
        layer(torch.randn(2, 3))
    with pytest.raises(ValueError, match="probability"):
        ours.VariationalDropout(1.5)
    meta = ours.VariationalDropout2d()
    assert meta(torch.ones(2, 3, 3, 4, device="meta")).device.type == "meta"


def test_mixed_init_draws_the_same():
    found = []
    for package in (theirs, ours):
        torch.manual_seed(5)
        found.append(package.mixed_init((40, 5)))
    torch.testing.assert_close(found[1], found[0])


def test_mem_gc_has_the_same_gradients():
    cell, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(4, 3, requires_grad=True)
    found = []
    for run in (cell, lambda x: theirs.mem_gc(cell, (x,)), lambda x: ours.mem_gc(cell, (x,))):
        value = run(x).square().sum()
        found.append(torch.autograd.grad(value, (x, *cell.parameters())))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_pieces_for_solvers_are_the_same():
    from torchdeq.solver import utils as their_utils

    from fastdeq.compat.torchdeq.solver import utils as our_utils

    found = []
    x = torch.randn(3, 4)
    for utils in (their_utils, our_utils):
        trace, lowest, steps = utils.init_solver_info(3, "cpu")
        best = torch.zeros_like(x)
        for k in range(3):
            residual = utils.batch_flatten(x).norm(dim=1) * torch.tensor([0.5, 1.5, 1.0]) ** k
            how = (k + 1, "rel", residual, 2 * residual, trace, lowest, steps)
            best = utils.update_state(best, x * (k + 1), *how)
        found.append((best, dict(utils.solver_stat_from_info("rel", lowest, trace, steps))))
    torch.testing.assert_close(found[1], found[0])
    assert dict(our_utils.dummy_solver_stat()) == dict(their_utils.dummy_solver_stat())
