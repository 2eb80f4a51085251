"""DEQLayer.diagnose against problems whose numbers are known."""

import math

import pytest
import torch
from advice_cases import F64, MLP, Attention, Conv, LinearCell, Pair, symmetric_matrix

from fastdeq import AffineCell, DEQLayer, Status
from fastdeq.diagnosis import predicted
from fastdeq.diagnostics import Diagnosis, spectral_radius

EIGENVALUES = [0.8, *torch.linspace(-0.5, 0.5, 15).tolist()]
TOL = 1e-8


@pytest.fixture(scope="module")
def linear():
    matrix = symmetric_matrix(EIGENVALUES)
    layer = DEQLayer(LinearCell(matrix), tol=TOL, solver="picard")
    x = torch.randn(12, 16, dtype=F64, generator=torch.Generator().manual_seed(1))
    target = torch.randn(12, 16, dtype=F64, generator=torch.Generator().manual_seed(2))
    found = layer.diagnose(x, loss=lambda z: (z * target).sum(), max_products=40)
    return matrix, x, target, found


def test_spectrum(linear):
    *_, d = linear
    assert isinstance(d, Diagnosis)
    assert len(d.probed) == 8
    # As many products as the state has entries are exact up to rounding.
    assert d.radius.value == pytest.approx([0.8] * 8, rel=1e-10)
    assert d.norm.value == pytest.approx([0.8] * 8, rel=1e-10)
    assert d.distance == pytest.approx(0.2, rel=1e-9)
    assert d.growth == pytest.approx(1.25, rel=1e-9)


def test_iterations_are_those_predicted(linear):
    *_, d = linear
    assert d.predicted_iterations == pytest.approx([math.log(TOL) / math.log(0.8)] * 8, rel=1e-9)
    # The share of the slowest direction in the start, and |f - z| against |z|: |c| (1 - 0.8) 0.8^k
    # of |z|, between 1/50 and 1 of the sixteen directions here, so log(50) / log(1 / 0.8) steps.
    seen = d.forward.iterations.double()
    assert (seen - math.log(TOL) / math.log(0.8)).abs().max() <= math.log(50) / math.log(1.25)
    assert d.contraction == pytest.approx([0.8] * 12, abs=1e-3)  # (0.5 / 0.8)^k of another share
    steps = d.forward.iterations.double()
    assert d.rate == pytest.approx(d.forward.residual.double() ** (1 / steps), rel=1e-12)


def test_gradients(linear):
    matrix, x, target, d = linear
    inverse = torch.linalg.inv(torch.eye(16, dtype=F64) - matrix)
    u, z = target @ inverse, x @ inverse  # symmetric
    # Each direction of the adjoint, and of z*, is off by at most tol / (1 - 0.8).
    error = 5 * TOL * 5
    assert d.gradient_norm == pytest.approx(target.norm(dim=1), rel=1e-12)
    assert d.adjoint_norm == pytest.approx(u.norm(dim=1), rel=error)
    assert d.amplification == pytest.approx(u.norm(dim=1) / target.norm(dim=1), rel=error)
    assert float(d.amplification.max()) < 5
    (w,) = d.parameters
    expected = u.T @ z
    assert w.name == "w.weight"
    assert w.norm == pytest.approx(float(expected.norm()), rel=10 * error)
    assert w.relative == pytest.approx(w.norm / float(matrix.norm()), rel=1e-6)
    # 2-norms are of float32.
    assert w.two_norm == pytest.approx(float(torch.linalg.matrix_norm(expected, 2)), rel=1e-5)
    assert d.recurrent == ("w.weight",)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "general"])
def test_the_adjoint_of_affine_cells(fused):
    cell = AffineCell(5, 10, scale=0.7, dtype=F64)
    layer = DEQLayer(cell if fused else lambda z, x: cell(z, x), tol=1e-10)
    x = torch.randn(6, 5, dtype=F64)
    z0 = None if fused else torch.zeros(6, 10, dtype=F64)
    weight = torch.randn(6, 10, dtype=F64)
    d = layer.diagnose(x, z0=z0, loss=lambda z: (z * weight).sum())
    z = d.forward.value
    J = (1 - z**2).unsqueeze(2) * cell.recurrent_weight().detach()
    u = torch.linalg.solve(torch.eye(10, dtype=F64) - J.transpose(1, 2), weight.unsqueeze(2))
    assert d.adjoint_norm == pytest.approx(u.squeeze(2).norm(dim=1), rel=1e-7)
    assert d.norm.value == pytest.approx(torch.linalg.matrix_norm(J, 2)[d.probed], rel=1e-6)
    radii = torch.linalg.eigvals(J).abs().amax(1)[d.probed]
    assert d.radius.value == pytest.approx(radii, rel=1e-6)
    assert d.parameters  # those of a cell that a function closes over as well


def test_prediction():
    radius = torch.tensor([0.1, 0.9, 1.0, 1.5, math.nan, 0.0])
    steps = predicted(radius, 1e-2)
    assert steps[:2] == pytest.approx([2.0, math.log(1e-2) / math.log(0.9)], rel=1e-5)
    assert steps[2:4].tolist() == [math.inf, math.inf]
    assert math.isnan(steps[4])
    assert steps[5] == 1
    assert predicted(radius[:1], 0.0).tolist() == [math.inf]


def kinds():
    g = torch.Generator().manual_seed(0)

    def x(*shape):
        return torch.randn(*shape, generator=g)

    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    gain = 0.5 + torch.rand(9, 1, generator=g)
    return {
        "context": (MLP(), {}, (x(9, 12), gain), {}),
        "keyword": (MLP(), {}, (x(9, 12),), {"gain": gain}),
        "attention": (Attention(), {}, (x(9, 5, 8),), {"mask": mask}),
        "convolution": (Conv(), {}, (x(9, 4, 5, 5),), {}),
        "structure": (Pair(), {}, (x(9, 5),), {}),
        "batch_dim": (MLP(), {"batch_dim": 1}, (x(3, 9, 12),), {}),
        "two dimensions": (MLP(), {"batch_dim": (0, 1)}, (x(3, 9, 12),), {}),
        "one sample": (MLP(), {"batch_dim": None}, (x(9, 12),), {}),
        "leading": (AffineCell(4, 6), {}, (x(3, 9, 4),), {}),
        "one_step": (MLP(), {"gradient": "one_step"}, (x(9, 12),), {}),
        "phantom": (MLP(), {"gradient": "phantom"}, (x(9, 12),), {}),
        "compact": (MLP(), {"compact": True}, (x(9, 12),), {}),
        "double": (MLP().double(), {}, (x(9, 12).double(),), {}),
    }


@pytest.mark.parametrize("name", kinds())
def test_any_cell(name):
    cell, options, arguments, keywords = kinds()[name]
    layer = DEQLayer(cell, **options)
    d = layer.diagnose(*arguments, samples=4, max_products=30, **keywords)
    batch = d.forward.status.numel()
    assert batch == {"one sample": 1, "two dimensions": 27, "leading": 27}.get(name, 9)
    assert bool(d.forward.converged.all())
    for per_sample in (d.contraction, d.rate, d.gradient_norm, d.adjoint_norm, d.stragglers):
        assert per_sample.shape == (batch,)
    assert d.radius.value.shape == d.norm.value.shape == d.probed.shape
    assert bool((d.norm.upper >= d.radius.value * 0.98).all())  # NaN where it could not be had
    # Each kind that has one batch dimension can be probed for four samples alone.
    assert len(d.probed) == {"one sample": 1, "two dimensions": 27}.get(name, 4)
    implicit = name not in ("one_step", "phantom")
    assert bool(d.adjoint_norm.isfinite().all()) == implicit
    assert (d.adjoint is not None) == implicit
    every = spectral_radius(
        layer, *arguments[:1], d.forward.value, context=arguments[1:], max_products=30, **keywords
    )
    # The same start vector for each sample: the same numbers, up to the rounding of products.
    assert d.radius.value == pytest.approx(every.value[d.probed], rel=2e-2)
    assert all(len(line) < 80 for line in str(d).splitlines())
    assert "recommendations" in repr(d)


def test_auxiliary_outputs():
    cell = MLP()
    layer = DEQLayer(lambda z, x: (cell(z, x), {"count": 1}), has_aux=True)
    d = layer.diagnose(torch.randn(9, 12), samples=3)
    assert len(d.probed) == 3
    assert len(d.parameters) == 4


def test_stragglers_and_who_is_probed():
    """Diagonal maps: the last sample is slow, and probed first."""

    class Diagonal(torch.nn.Module):
        def forward(self, z, x, rate):
            return rate * z + x

    rate = torch.tensor([0.1] * 10 + [0.97, 1.5]).unsqueeze(1)
    layer = DEQLayer(Diagonal(), solver="picard", on_failure="ignore", max_iter=200)
    d = layer.diagnose(torch.ones(12, 2), rate, samples=3)
    assert d.stragglers.tolist() == [False] * 10 + [True, True]
    assert d.straggler_share == pytest.approx(1 / 6)
    assert d.converged_share == pytest.approx(11 / 12)
    assert d.probed[:1].tolist() == [11]
    assert d.radius.value == pytest.approx([1.5, 0.1, 0.1], rel=1e-5)
    assert d.forward.status[11] != int(Status.CONVERGED)
    assert any("no equilibrium" in note for note in d.notes)


def test_what_cannot_be_had():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z / 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g / 2

    d = DEQLayer(lambda z, x: Once.apply(z) + x).diagnose(torch.randn(3, 2))
    assert d.radius.value == pytest.approx([0.5] * 3, rel=1e-5)
    assert bool(d.norm.value.isnan().all())
    assert any("no 2-norm" in note for note in d.notes)
    assert any("no parameters" in note for note in d.notes)
    assert d.parameters == ()
