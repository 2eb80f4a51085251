"""``compact``: general cells are evaluated for the samples that are not finished."""

import itertools

import pytest
import torch
from torch import nn

from fastdeq import GMRES, Anderson, DEQLayer, Picard, Status
from fastdeq.backends import extension

DIM = 6


def data(batch, slow=(), dtype=torch.float64, seed=0):
    """x, and a gain per sample: 0.3, and 0.95 for slow ones."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, DIM, generator=g, dtype=dtype)
    gain = torch.full((batch, 1), 0.3, dtype=dtype)
    gain[list(slow)] = 0.95
    return x, gain


class Cell(nn.Module):
    """tanh(gain A z + x), A orthogonal, which counts the samples of its calls."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        q, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=g, dtype=dtype))
        self.a = nn.Parameter(q)
        self.calls = []

    def forward(self, z, x, gain):
        self.calls.append(len(z))
        return torch.tanh(gain * (z @ self.a.t()) + x)


def solved(cell, x, *context, **options):
    """z, gradients of x and A, and both solutions."""
    options = {"tol": 1e-10, "max_iter": 500, **options}
    layer = DEQLayer(cell, **options)
    x = x.clone().requires_grad_()
    z = layer(x, *context)
    weights = torch.linspace(1, 2, z.numel(), dtype=z.dtype).view_as(z)
    grads = torch.autograd.grad((weights * z).sum(), [x, *cell.parameters()])
    return z.detach(), grads, layer.last_solution, layer.last_adjoint_solution


def assert_same(found, expected, atol=1e-8):
    for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=atol)


SOLVERS = [
    (Picard(), "neumann"),
    ("auto", "auto"),
    (Anderson(window=3), GMRES(restart=3)),
    (Picard(damping=0.8), "anderson"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("solver", "adjoint"), SOLVERS, ids=str)
def test_finished_samples_are_left_out_in_both_directions(solver, adjoint, backend):
    if backend == "auto" and extension.module is None:
        pytest.skip(f"no compiled extension: {extension.why_missing}")
    cell, (x, gain) = Cell(), data(16, slow=[2, 11])
    options = {"solver": solver, "adjoint": adjoint, "backend": backend}
    expected = solved(cell, x, gain, **options)
    found = solved(cell, x, gain, compact=True, **options)
    assert_same(found, expected)
    for solution, before in zip(found[2:], expected[2:], strict=True):
        assert solution.converged.all()
        assert solution.path == "general, finished samples left out"
        assert before.path == "general"
        assert before.sample_evaluations == 16 * before.evaluations
        needed = int((solution.iterations + 1).sum())
        assert solution.sample_evaluations <= 2 * needed + 2 * 16
    torch.testing.assert_close(
        found[2].iterations.double(), expected[2].iterations.double(), atol=3, rtol=0.1
    )


def test_counts_are_those_of_the_calls():
    cell, (x, gain) = Cell(), data(12, slow=[5])
    layer = DEQLayer(cell, solver="picard", tol=1e-8, max_iter=800, compact=True)
    with torch.no_grad():
        layer(x, gain)
    solution = layer.last_solution
    assert len(cell.calls) == solution.evaluations
    assert sum(cell.calls) == solution.sample_evaluations
    assert cell.calls[-2:] == [1, 12]  # the last one confirms the result


def test_no_more_than_the_samples_need_by_halves():
    cell = Cell()
    x, _ = data(64)
    gain = torch.linspace(0.1, 0.97, 64, dtype=torch.float64).unsqueeze(1)
    layer = DEQLayer(cell, solver="picard", tol=1e-8, max_iter=2000, compact=True)
    with torch.no_grad():
        layer(x, gain)
    sizes = sorted(set(cell.calls), reverse=True)
    assert len(sizes) >= 5
    assert all(2 * after <= before for before, after in itertools.pairwise(sizes))
    # And a comparison of each part, and a confirmation of all.
    needed = 2 * int((layer.last_solution.iterations + 1).sum()) + 2 * 64
    assert sum(cell.calls) <= needed


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
    class Shared(Cell):
        def forward(self, z, x, gain, bias):
            return super().forward(z, x + bias, gain)

    cell, (x, gain) = Shared(), data(DIM, slow=[4])
    bias = torch.randn(DIM, dtype=torch.float64)
    expected = solved(cell, x, gain, bias)
    found = solved(cell, x, gain, bias, compact=True)
    assert_same(found, expected)
    assert "left out" in found[2].path
    assert "left out" in found[3].path


def test_a_shared_argument_that_was_uniform_once_is_still_found_out():
    """Rows that are all the same are right whichever are taken; the next call's are not."""

    class Shared(Cell):
        def forward(self, z, x, gain, bias):
            return super().forward(z, x + bias, gain)

    cell, (x, gain) = Shared(), data(DIM, slow=[4])
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


def test_states_of_several_parts_in_another_dimension():
    """A tuple of (T, B, d)."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = []

        def forward(self, z, x, gain):
            a, b = z
            self.calls.append(a.shape[1])
            return torch.tanh(gain * b.flip(0) + x), gain * a.flip(2)

        def initial_state(self, x):
            return torch.zeros_like(x), torch.zeros_like(x)

    cell = Parts()
    x = torch.randn(3, 10, 4, dtype=torch.float64)
    gain = torch.full((1, 10, 1), 0.5, dtype=torch.float64)
    gain[0, 7] = 0.95
    found = []
    for compact in (False, True):
        layer = DEQLayer(cell, batch_dim=1, tol=1e-9, max_iter=500, compact=compact)
        leaf = x.clone().requires_grad_()
        a, b = layer(leaf, gain)
        found.append((a, b, *torch.autograd.grad((a * b).sum() + a.sum(), leaf)))
        assert layer.last_solution.converged.all()
    assert min(cell.calls) == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-7)


def test_channels_last_goes_on_for_a_part():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.layouts = []

        def forward(self, z, x, gain):
            self.layouts.append(
                (len(z), z.is_contiguous(memory_format=torch.channels_last), x.stride(1) == 1)
            )
            return torch.tanh(gain * z.roll(1, 2) + x)

    cell = Conv()
    x = torch.randn(8, 3, 4, 5).to(memory_format=torch.channels_last)
    gain = torch.full((8, 1, 1, 1), 0.3)
    gain[:2] = 0.9
    with torch.no_grad():
        DEQLayer(cell, compact=True, max_iter=300)(x, gain)
    assert {n for n, *_ in cell.layouts} >= {8, 1}
    assert all(z and x for _, z, x in cell.layouts)


def test_a_bad_sample_and_one_that_never_ends_do_not_harm_the_others():
    cell, (x, gain) = Cell(), data(9, slow=[6])
    gain[2] = 40.0  # chaotic
    x[4] = torch.nan
    x[5, 0] = torch.inf
    options = {"tol": 1e-9, "max_iter": 300, "on_failure": "ignore"}
    results = []
    for compact in (False, True):
        layer = DEQLayer(cell, compact=compact, **options)
        with torch.no_grad():
            results.append((layer(x, gain), layer.last_solution))
    (z, plain), (found, solution) = results
    good = [0, 1, 3, 6, 7, 8]
    torch.testing.assert_close(found[good], z[good], atol=1e-7, rtol=1e-7)
    assert solution.status.tolist() == plain.status.tolist()
    assert solution.status[4] == Status.NONFINITE
    assert "left out" in solution.path


def test_a_cell_that_writes_to_its_argument():
    class InPlace(Cell):
        def forward(self, z, x, gain):
            self.calls.append(len(z))
            return z.matmul(self.a.t()).mul_(gain).add_(x).tanh_() + z.mul_(0)

    cell, (x, gain) = InPlace(), data(10, slow=[3])
    with torch.no_grad():
        found = DEQLayer(cell, tol=1e-9, max_iter=500, compact=True)(x, gain)
        expected = DEQLayer(Cell(), tol=1e-9, max_iter=500)(x, gain)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)
    assert min(cell.calls) == 1


def test_second_derivatives():
    cell, (x, gain) = Cell(), data(5, slow=[1])
    values = []
    for compact in (False, True):
        leaf = x.clone().requires_grad_()
        z = DEQLayer(cell, tol=1e-12, max_iter=2000, compact=compact)(leaf, gain)
        (grad,) = torch.autograd.grad(z.pow(3).sum(), leaf, create_graph=True)
        values.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    torch.testing.assert_close(*values, atol=1e-7, rtol=1e-7)


def test_under_autocast_parts_agree_to_its_rounding():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)
            nn.init.orthogonal_(self.a.weight)
            self.calls = []

        def forward(self, z, x, gain):
            self.calls.append(len(z))
            return gain * self.a(z).float() + x

    cell, x = Linear(), torch.randn(32, 64)
    gain = torch.full((32, 1), 0.3)
    gain[9] = 0.9
    layer = DEQLayer(cell, tol=1e-2, compact=True)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x.requires_grad_(), gain)
    z.sum().backward()
    assert "left out" in layer.last_solution.path
    assert "left out" in layer.last_adjoint_solution.path


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


def test_the_representation_names_it():
    assert "compact=(0, None)" in repr(DEQLayer(Cell(), compact=(0, None)))
    assert "compact" not in repr(DEQLayer(Cell()))


def test_a_compiled_cell_is_compiled_a_few_times_whatever_the_sizes():
    """Once for the first batch, once for any batch, and once for a single sample."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    cell = Cell()
    x, _ = data(48)
    gain = torch.linspace(0.1, 0.97, 48, dtype=torch.float64).unsqueeze(1)
    compiled = torch.compile(Plain(cell.a), backend=backend)
    layer = DEQLayer(compiled, solver="picard", tol=1e-8, max_iter=2000, compact=True)
    torch._dynamo.reset()
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        z = layer(leaf, gain)
        assert "left out" in layer.last_solution.path
        z.sum().backward()
    assert len(graphs) <= 3
    expected = DEQLayer(cell, solver="picard", tol=1e-8, max_iter=2000)(x, gain)
    torch.testing.assert_close(z, expected, atol=1e-6, rtol=1e-6)


class Plain(nn.Module):
    """As :class:`Cell`, without a count."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, z, x, gain):
        return torch.tanh(gain * (z @ self.a.t()) + x)


def errors(cell, x, *context, **options):
    """Of compact=True from float64 without it, relative, and the layer."""
    doubles = [t.double() for t in (x, *context)]
    limits = {"max_iter": 900, "on_failure": "ignore"}
    with torch.no_grad():
        layer = DEQLayer(cell, compact=True, **limits, **options)
        z = layer(x, *context)
        truth = DEQLayer(cell, tol=1e-9, **limits)(*doubles)
    return float((z - truth).norm() / truth.norm()), layer


@pytest.mark.filterwarnings("ignore:compact=True")
@pytest.mark.parametrize("shared", ["first row", "largest", "mean", "bound"])
def test_a_way_that_is_right_for_the_first_part_alone(shared):
    """A shared table with as many rows as samples: the first part holds its first row, a later one
    does not; and a bound that is reached at the end alone."""
    batch, size = 32, 4
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(batch, size, generator=generator)
    table[0] = 3
    rate = torch.full((batch, 1), 0.05)
    rate[0], rate[1:10], rate[20:23] = 0.6, 0.6, 0.97

    def cell(z, x, rate, table):
        turned = rate * torch.tanh(z.roll(1, 1)) + x
        if shared == "first row":
            return turned + table[0]
        if shared == "largest":
            return turned + table.amax(0)
        if shared == "mean":
            return turned + table.mean(0)
        return torch.minimum(turned.cumsum(1), table[:, 0].mean() + 0.4)

    x = torch.randn(batch, size, generator=generator)
    error, layer = errors(cell, x, rate, table, tol=1e-5)
    assert error < 1e-3
    assert layer.last_solution.converged.all()


@pytest.mark.filterwarnings("ignore:compact=True")
def test_parts_of_different_size_are_compared_each():
    table = torch.randn(16, 4)

    def cell(z, x, rate, table):
        a, b = z
        return rate * torch.tanh(a) + 1e3 * x, rate * torch.tanh(b) + 1e-2 * table.mean(0)

    x, rate = torch.randn(16, 4), torch.full((16, 1), 0.1)
    rate[3] = 0.95
    start = (torch.zeros(16, 4), torch.zeros(16, 4))
    options = {"tol": 1e-4, "max_iter": 900}
    with torch.no_grad():
        found = DEQLayer(cell, compact=True, **options)(x, rate, table, z0=start)
        expected = DEQLayer(cell, **options)(x, rate, table, z0=start)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=5e-3)


@pytest.mark.filterwarnings("ignore:compact=True")
@pytest.mark.parametrize("how", ["states", "autocast"])
def test_a_shared_mean_in_bfloat16(how):
    table = 1 + torch.randn(16, 8)

    def cell(z, x, rate, table):
        return rate * torch.tanh(z) + x + table.to(x.dtype).mean(0)

    x, rate = torch.randn(16, 8), torch.full((16, 1), 0.1)
    rate[3] = 0.9
    kind = torch.bfloat16 if how == "states" else torch.float32
    found = []
    for compact in (False, True):
        layer = DEQLayer(cell, compact=compact, tol=1e-2, max_iter=200, on_failure="ignore")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found.append(layer(x.to(kind), rate.to(kind), table).float())
    error = (found[1] - found[0]).norm(dim=1) / found[0].norm(dim=1)
    assert error.max() < 0.2  # of the slow one, 1e-2 / (1 - 0.9)
    assert error.median() < 0.02


def test_an_adjoint_that_disagrees_does_not_bar_later_solves():
    """x is changed in place between forward and backward."""
    cell, (x, gain) = Cell(), data(10, slow=[3])
    layer = DEQLayer(cell, tol=1e-8, max_iter=600, compact=True)
    for _ in range(2):
        held = x.clone()
        z = layer(held + 0 * cell.a.sum().detach(), gain)
        assert "left out" in layer.last_solution.path
        z.sum().backward()


def test_a_cell_that_cannot_take_one_sample_alone():
    class Several(Cell):
        def forward(self, z, x, gain):
            if len(z) < 2:
                raise RuntimeError("two samples or more")
            return super().forward(z, x, gain)

    cell = Several()
    x, _ = data(32)
    gain = torch.linspace(0.1, 0.95, 32, dtype=torch.float64).unsqueeze(1)
    options = {"tol": 1e-9, "max_iter": 900}
    with torch.no_grad():
        found = DEQLayer(cell, compact=True, **options)(x, gain)
        expected = DEQLayer(cell, **options)(x, gain)
    assert min(cell.calls) < 32
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)


def test_fixed_counts_leave_nothing_out():
    cell, (x, gain) = Cell(), data(8)
    layer = DEQLayer(cell, solver=Picard(fixed_iterations=9), compact=True, on_failure="ignore")
    with torch.no_grad():
        layer(x, gain)
    assert cell.calls == [8] * 10


@pytest.mark.parametrize("compact", [(0,), (0, None, 0), (0, 3)])
def test_wrong_dimensions_raise_at_once(compact):
    cell, (x, gain) = Cell(), data(6)
    with torch.no_grad(), pytest.raises(ValueError, match="compact="):
        DEQLayer(cell, compact=compact, max_iter=1, on_failure="ignore")(x, gain)
    assert not cell.calls


def test_on_the_meta_device():
    with torch.device("meta"):
        cell = nn.Linear(4, 4)
    x = torch.empty(8, 4, device="meta")
    layer = DEQLayer(lambda z, x: torch.tanh(cell(z) + x), compact=True)
    assert layer(x).shape == (8, 4)
    with torch.no_grad():
        assert layer(x).shape == (8, 4)
