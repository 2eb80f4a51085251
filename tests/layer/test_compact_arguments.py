"""``compact``: what belongs to samples among the arguments of a cell, and how mistakes are seen."""

import pytest
import torch
from compact_cases import DIM, Biased, Cell, assert_same, data, solved

from fastdeq import DEQLayer
from fastdeq.solve.unfinished import LEFT_OUT, NOT_TOLD_APART


def test_what_is_shared_is_passed_whole():
    """A bias with as many entries as there are samples, and a matrix of that size."""

    class Shared(Cell):
        def forward(self, z, x, gain, bias, matrix):
            return super().forward(z, x + bias @ matrix, gain)

    cell, (x, gain) = Shared(), data(DIM, slow=[1])
    bias = torch.randn(DIM, dtype=torch.float64)
    matrix = torch.randn(DIM, DIM, dtype=torch.float64)
    expected = solved(cell, x, gain, bias, matrix)
    for compact in ((0, 0, None, None), (0, -2, None, None)):
        found = solved(cell, x, gain, bias, matrix, compact=compact)
        assert_same(found, expected)
        assert "left out" in found[2].path
        assert "left out" in found[3].path


def test_one_shared_argument_of_the_size_of_the_batch_is_found_out():
    cell, (x, gain) = Biased(), data(DIM, slow=[4])
    bias = torch.randn(DIM, dtype=torch.float64)
    expected = solved(cell, x, gain, bias)
    found = solved(cell, x, gain, bias, compact=True)
    assert_same(found, expected)
    assert "left out" in found[2].path
    assert "left out" in found[3].path


def test_a_shared_argument_that_was_uniform_once_is_still_found_out():
    """Rows that are all the same are right whichever are taken; the next call's are not."""

    cell, (x, gain) = Biased(), data(DIM, slow=[4])
    layers = [DEQLayer(cell, tol=1e-10, max_iter=500, compact=c) for c in (False, True)]
    for bias in (torch.zeros(DIM, dtype=torch.float64), torch.randn(DIM, dtype=torch.float64)):
        with torch.no_grad():
            expected, found = (layer(x, gain, bias) for layer in layers)
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)
        assert "left out" in layers[1].last_solution.path


class Mixing(Cell):
    """Each sample sees the mean of all."""

    def forward(self, z, x, gain):
        return super().forward(z, x + 0.2 * z.mean(0), gain)


class Random(Cell):
    def forward(self, z, x, gain):
        return super().forward(z, x + 5e-3 * torch.randn_like(x), gain)


class Holding(Cell):
    """A mask for the batch, set before the call."""

    mask = None

    def forward(self, z, x, gain):
        return super().forward(z, x * self.mask, gain)


@pytest.mark.parametrize("kind", [Mixing, Random, Holding])
def test_where_a_part_is_not_that_of_the_whole_nothing_is_left_out(kind):
    cell, (x, gain) = kind(), data(8, slow=[3])
    cell.mask = torch.rand(8, DIM, dtype=torch.float64)
    layer = DEQLayer(cell, tol=1e-2, max_iter=60, compact=True, on_failure="ignore")
    with torch.no_grad(), pytest.warns(UserWarning, match=r"compact=True: all samples"):
        layer(x, gain)
    assert layer.last_solution.path == "general, samples not told apart"
    whole = cell.calls[-1]
    assert whole == 8
    with torch.no_grad():  # warned of once
        layer(x, gain)


@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-6])
def test_a_coupling_is_noticed_down_to_a_tenth_of_the_tolerance(share):
    class Weak(Cell):
        def forward(self, z, x, gain):
            return super().forward(z, x + share * z.mean(0), gain)

    cell, (x, gain) = Weak(), data(8, slow=[3])
    layer = DEQLayer(cell, tol=1e-8, max_iter=900, compact=True)
    with torch.no_grad(), pytest.warns(UserWarning, match="compact"):
        layer(x, gain)


def errors(cell, x, *context, **options):
    """Of compact=True from float64 without it, relative, and the layer."""
    doubles = [t.double() for t in (x, *context)]
    limits = {"max_iter": 900, "on_failure": "ignore"}
    with torch.no_grad():
        layer = DEQLayer(cell, compact=True, **limits, **options)
        z = layer(x, *context)
        truth = DEQLayer(cell, tol=1e-9, **limits)(*doubles)
    return float((z - truth).norm() / truth.norm()), layer


@pytest.mark.parametrize("shared", ["first row", "largest", "mean"])
def test_a_table_with_as_many_rows_as_samples(shared, recwarn):
    """Taken apart, its first row and its largest entries are those of all of it in the first part
    alone, and its mean in none."""
    batch, size = 32, 4
    generator = torch.Generator().manual_seed(1)
    table = 0.02 * torch.randn(batch, size, generator=generator)
    table[0] = 0.1  # slopes of tanh stay near 1
    rate = torch.full((batch, 1), 0.05)
    rate[0], rate[1:10], rate[20:23] = 0.6, 0.6, 0.97
    calls = []

    def cell(z, x, rate, table):
        calls.append(len(z))
        seen = {"first row": table[0], "largest": table.amax(0), "mean": table.mean(0)}
        return rate * torch.tanh(z.roll(1, 1)) + x + seen[shared]

    x = 0.02 * torch.randn(batch, size, generator=generator)
    error, layer = errors(cell, x, rate, table, tol=1e-5, solver="picard")
    assert error < 1e-5 / (1 - 0.97) * 1.1
    assert layer.last_solution.path == LEFT_OUT
    if shared == "mean":  # left whole from the first
        assert min(calls) < 3
    else:  # 3 samples are evaluated once, to compare
        assert set(calls) == {32, 13, 3}
        assert calls.count(3) == 1
    assert not recwarn


def test_a_part_that_agrees_until_a_bound_is_reached_is_found_out_at_the_end():
    """One sample is left, whose part of the bound ``(n,)``, n being the batch, is one entry."""
    batch = 64
    x, rate = 0.3 * torch.randn(batch, batch), torch.full((batch, 1), 0.05)
    x[5], rate[5] = 0.1, 0.99
    bound = torch.full((batch,), 5.0)
    bound[0], bound[5], bound[7] = 9.0, 8.0, 3.0

    def cell(z, x, rate, bound):
        return torch.minimum(rate * z.roll(1, -1) + x, bound)

    with pytest.warns(UserWarning, match="compact=True"):
        error, layer = errors(cell, x, rate, bound, tol=1e-5, solver="picard")
    assert error < 1e-5 / (1 - 0.99) * 1.1
    assert layer.last_solution.converged.all()
    assert layer.last_solution.path == NOT_TOLD_APART


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_parts_of_different_size_are_compared_each(backend, recwarn):
    """b is 1e-6 of a, and a mistake in b alone 1e-6 of the state: less than a tenth of 1e-4."""
    table = 1 + torch.rand(16, 4)

    def cell(z, x, rate, table):
        a, b = z
        return rate * torch.tanh(a) + 1e3 * x, rate * torch.tanh(b) + 1e-3 * table.mean(0)

    x, rate = 1 + torch.rand(16, 4), torch.full((16, 1), 0.1)
    rate[3] = 0.95
    start = (torch.zeros(16, 4), torch.zeros(16, 4))
    options = {"max_iter": 900, "backend": backend}
    layer = DEQLayer(cell, compact=True, tol=1e-4, **options)
    with torch.no_grad():
        found = layer(x, rate, table, z0=start)
        expected = DEQLayer(cell, tol=1e-6, **options)(x, rate, table, z0=start)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 / (1 - 0.95) * 1.2 * other.norm()
    assert layer.last_solution.path == LEFT_OUT
    assert not recwarn


@pytest.mark.parametrize("how", ["states", "autocast"])
def test_a_shared_mean_in_bfloat16(how, recwarn):
    """A row of the table is its mean to some percent, which bfloat16 can tell apart."""
    table = 1 + 0.1 * torch.randn(16, 64)
    turn = torch.linalg.qr(torch.randn(64, 64))[0]

    def cell(z, x, rate, table):
        return rate * (z @ turn.to(z.dtype)).to(x.dtype) + x + table.to(x.dtype).mean(0)

    x, rate = 0.1 * torch.randn(16, 64), torch.full((16, 1), 0.02)
    rate[3] = 0.5
    kind = torch.bfloat16 if how == "states" else torch.float32
    layer = DEQLayer(cell, compact=True, tol=2e-2, max_iter=200)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = layer(x.to(kind), rate.to(kind), table).float()
        expected = DEQLayer(cell, tol=1e-6, max_iter=200)(x, rate, table)
    assert layer.last_solution.path == LEFT_OUT
    assert not recwarn
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error[3] <= (2e-2 + 2**-7) / (1 - 0.5)  # a row for the mean: 0.1 / (1 - 0.5)


def test_an_adjoint_that_disagrees_does_not_bar_later_solves():
    """x, which no operation saves, is changed in place between forward and backward."""
    cell, (x, gain) = Cell(), data(10, slow=[3])
    expected = solved(cell, x, gain, tol=1e-9)[1][1]
    layer = DEQLayer(cell, tol=1e-9, max_iter=600, compact=True)
    for _ in range(2):
        held = x.clone()
        z = layer(held, gain)
        assert layer.last_solution.path == LEFT_OUT
        held.mul_(-2)
        weights = torch.linspace(1, 2, z.numel(), dtype=z.dtype).view_as(z)
        (grad,) = torch.autograd.grad((weights * z).sum(), cell.a)
        assert layer.last_adjoint_solution.path == NOT_TOLD_APART
        torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compact": "yes"}, "True, False, or a tuple"),
        ({"compact": (0, 1.5)}, "dimension that counts samples"),
        ({"compact": (True,)}, "dimension that counts samples"),
        ({"compact": True, "batch_dim": None}, "one batch dimension"),
        ({"compact": True, "batch_dim": (0, 1)}, "one batch dimension"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        DEQLayer(Cell(), **options)


@pytest.mark.parametrize(
    ("compact", "message"),
    [((0,), "1 entries for 2 arguments"), ((0, 3), "without 6 samples"), ((0, 1), "without 6")],
)
def test_dimensions_that_the_arguments_do_not_have(compact, message):
    cell, (x, gain) = Cell(), data(6, slow=[0])
    layer = DEQLayer(cell, compact=compact, max_iter=400)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        layer(x, gain)


@pytest.mark.parametrize("compact", [(0,), (0, None, 0), (0, 3)])
def test_wrong_dimensions_raise_at_once(compact):
    cell, (x, gain) = Cell(), data(6)
    with torch.no_grad(), pytest.raises(ValueError, match="compact="):
        DEQLayer(cell, compact=compact, max_iter=1, on_failure="ignore")(x, gain)
    assert not cell.calls
