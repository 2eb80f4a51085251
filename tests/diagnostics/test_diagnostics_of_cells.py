"""Diagnostics of any cell: where they look, what they leave alone, what they refuse."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from diagnostics_cases import F64, at_zero, haar
from layer_cases import Residual, affine

from fastdeq import AffineCell, ConvergenceWarning, DEQLayer, Orthogonal, Symmetric
from fastdeq.diagnostics import eigenvalue_bounds, jacobian_norm, spectral_radius


def jacobian(cell, z, x):
    """``(B, n, n)`` of a cell on rows."""
    of_sum = torch.autograd.functional.jacobian(lambda state: cell(state, x).sum(0), z)
    return of_sum.transpose(0, 1)


@pytest.mark.parametrize("kind", ["dense", "orthogonal", "symmetric", "general"])
def test_at_the_equilibrium_of_a_cell(kind):
    cell = Residual(8) if kind == "general" else affine(8, 8, weight=kind, scale=0.5)
    cell = cell.double()
    x = torch.randn(5, 8, dtype=F64)
    with torch.no_grad():
        z = DEQLayer(cell, tol=1e-10, max_iter=500)(x)
    exact = jacobian(cell, z, x)
    # The default state solves to a tolerance of 1e-4, at which J is off by about as much.
    for given, slack in ((z, 1e-12), (None, 1e-2)):
        for measure, truth in (
            (spectral_radius, torch.linalg.eigvals(exact).abs().amax(1)),
            (jacobian_norm, torch.linalg.svdvals(exact)[:, 0]),
        ):
            found = measure(cell, x, given, tol=0)
            torch.testing.assert_close(found.value, truth, rtol=slack, atol=slack)


def test_a_layer_is_examined_where_its_own_options_lead():
    layer = DEQLayer(affine(), tol=1e-7, max_iter=77)
    x = torch.randn(3, 6)
    layer(x)
    before = layer.last_solution
    found = spectral_radius(layer, x, tol=0)
    assert layer.last_solution is before
    torch.testing.assert_close(
        found.value, spectral_radius(layer.cell, x, before.value, tol=0).value
    )
    with pytest.warns(ConvergenceWarning):
        spectral_radius(DEQLayer(affine(), max_iter=1, tol=1e-9), x)


def test_nothing_of_the_model_changes():
    layer = DEQLayer(Residual()).train()
    x = torch.randn(3, 6, requires_grad=True)
    symmetric = Symmetric(6, 0.9)
    random_state = torch.get_rng_state()
    for measure in (spectral_radius, jacobian_norm):
        found = measure(layer, x)
        assert not found.value.requires_grad
    eigenvalue_bounds(symmetric)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert symmetric.weight.grad is None
    assert layer.training
    assert torch.is_grad_enabled()
    assert x.grad is None
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_mode_of_the_caller_does_not_matter(mode):
    cell, x = affine(), torch.randn(3, 6)
    expected = spectral_radius(cell, x), jacobian_norm(cell, x)
    with mode():
        y = x * 1.0
        z = cell.initial_state(y)
        found = spectral_radius(cell, y), jacobian_norm(cell, y)
        assert not torch.is_grad_enabled()
        spectral_radius(cell, y, z)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.value, b.value)


def test_generator():
    cell, x = affine(6, 40), torch.randn(3, 6)
    draw = [
        spectral_radius(cell, x, max_products=5, generator=torch.Generator().manual_seed(s)).value
        for s in (1, 1, 2)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert torch.equal(*(spectral_radius(cell, x, max_products=5).value for _ in range(2)))


@pytest.mark.parametrize("measure", [spectral_radius, jacobian_norm])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38, 0.0], ids=str)
def test_a_bad_sample_harms_no_other(measure, bad):
    """1e38: the state is finite, its image is not. 0: nor is the derivative of a square root."""

    def cell(z, x):
        return z.roll(1, 1) * z * x + 10 * z.sqrt()

    x = torch.rand(4, 6)
    z = torch.rand(4, 6)
    good = measure(cell, x, z)
    z[1] = bad
    found = measure(cell, x, z)
    assert found.value.isnan().tolist() == [False, True, False, False]
    for name in ("value", "accuracy", "upper", "products", "converged"):
        a, b = getattr(found, name), getattr(good, name)
        if a.is_floating_point():
            assert a[1].isnan()
        torch.testing.assert_close(a[[0, 2, 3]], b[[0, 2, 3]])
    assert not found.converged[1]
    assert found.products[1] == 0
    assert "4 samples, 3 converged" in repr(found)


def test_bad_input_to_a_cell_without_a_state_given():
    x = torch.randn(3, 6)
    x[2] = math.nan
    for cell in (affine(), Residual()):
        with pytest.warns(ConvergenceWarning):
            found = spectral_radius(cell, x)
        assert found.value.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("measure", [spectral_radius, jacobian_norm])
@pytest.mark.parametrize(
    "cell",
    [
        lambda z, x: x,
        lambda z, x: 2 * z.detach(),
        lambda z, x: torch.ones_like(x).requires_grad_() * x,
        lambda z, x: 0 * z + x,
    ],
    ids=["x only", "detached", "parameters only", "factor zero"],
)
def test_a_cell_that_does_not_depend_on_its_state(measure, cell):
    found = measure(cell, torch.randn(3, 5))
    assert found.value.tolist() == [0] * 3
    assert found.accuracy.tolist() == [0] * 3
    assert bool(found.converged.all())


@pytest.mark.parametrize("measure", [spectral_radius, jacobian_norm])
def test_tuple_state_is_one_state(measure):
    j = 0.1 * torch.randn(2, 9, 9, dtype=F64)

    def parts(z, x):
        rows = torch.cat([z[0].flatten(1), z[1]], 1)
        image = torch.einsum("bij,bj->bi", j, rows)
        return image[:, :6].reshape(2, 2, 3), image[:, 6:]

    z = torch.zeros(2, 2, 3, dtype=F64), torch.zeros(2, 3, dtype=F64)
    found = measure(parts, None, z, tol=0)
    torch.testing.assert_close(found.value, at_zero(measure, j, tol=0).value)


def test_images_and_context():
    conv = torch.nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular", bias=False)
    x = torch.randn(3, 2, 4, 4)
    found = jacobian_norm(lambda z, x, s: s * conv(z) + x, x, x, context=(0.5,), tol=0)
    # A circular convolution is diagonal in the Fourier basis but for its channels.
    spectrum = torch.fft.fft2(conv.weight.double(), s=(4, 4))
    truth = 0.5 * torch.linalg.matrix_norm(spectrum.permute(2, 3, 0, 1), 2).max().item()
    torch.testing.assert_close(found.value, torch.full((3,), truth), rtol=1e-5, atol=0)


def test_half_precision_states_their_rounding():
    j = (0.9 * haar(16)).to(torch.bfloat16)
    truth = float(torch.linalg.eigvals(j.double()).abs().max())
    zero = torch.zeros(1, 16, dtype=torch.bfloat16)
    found = spectral_radius(lambda z, x: z @ j.t() + x, zero, zero)
    assert abs(float(found.value) - truth) <= float(found.accuracy)
    assert float(found.accuracy) > 2**-8 * truth
    assert bool(found.converged)  # no more can be had


@pytest.mark.parametrize("measure", [spectral_radius, jacobian_norm])
@pytest.mark.parametrize("shape", [(0, 6), (3, 0)])
def test_empty(measure, shape):
    x = torch.zeros(shape)
    found = measure(lambda z, x: z, x, x)
    assert found.value.tolist() == [0] * shape[0]
    assert f"{shape[0]} samples" in repr(found)


def test_overflow_of_squares():
    """Entries whose squares leave the range of float32."""
    for size in (1e-25, 1e25):
        j = (size * torch.randn(1, 8, 8, dtype=F64)).float()
        truth = torch.linalg.svdvals(j.double())[:, 0]
        found = at_zero(jacobian_norm, j)
        torch.testing.assert_close(found.value.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("measure", [spectral_radius, jacobian_norm])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tolerance": 1e-3}, TypeError, "unknown option 'tolerance'.*valid options: .*tol"),
        ({"max_product": 3}, TypeError, "Did you mean 'max_products'"),
        ({"tol": -1.0}, ValueError, "tol must be"),
        ({"tol": math.nan}, ValueError, "tol must be"),
        ({"tol": "tight"}, ValueError, "tol must be"),
        ({"max_products": 0}, ValueError, "max_products must be"),
        ({"max_products": 2.5}, ValueError, "max_products must be"),
        ({"risk": 0.0}, ValueError, "risk must be"),
        ({"risk": 1.0}, ValueError, "risk must be"),
        ({"generator": 3}, TypeError, "torch.Generator"),
    ],
    ids=str,
)
def test_options_that_do_not_exist(measure, options, error, message):
    with pytest.raises(error, match=message):
        measure(affine(), torch.zeros(2, 6), **options)
    with pytest.raises(error, match=message):
        eigenvalue_bounds(torch.eye(3), **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: spectral_radius("cell", torch.zeros(2, 6)), TypeError, "cell must be"),
        (lambda: spectral_radius(Residual, torch.zeros(2, 6)), TypeError, "cell must be"),
        (lambda: spectral_radius(affine(), torch.zeros(2, 5)), ValueError, r"needs \(\.\.\., 6\)"),
        (
            lambda: spectral_radius(affine(), torch.zeros(2, 6), torch.zeros(2, 5)),
            ValueError,
            r"must have shape \(2, 6\)",
        ),
        (
            lambda: spectral_radius(Residual(), torch.zeros(2, 6), torch.zeros(1, 6)),
            ValueError,
            "they must be equal",
        ),
        (lambda: spectral_radius(lambda z, x: z, 3.0), TypeError, "pass the state as z="),
        (lambda: spectral_radius(lambda z, x: 1, torch.zeros(2, 6)), TypeError, "returned"),
        (
            lambda: spectral_radius(lambda z, x: z, None, torch.zeros(2, 3).int()),
            TypeError,
            "floating point",
        ),
        (
            lambda: jacobian_norm(affine(), torch.zeros(2, 6), max_products=1),
            ValueError,
            "2 products",
        ),
        (lambda: eigenvalue_bounds(torch.zeros(3, 4)), ValueError, r"must be \(d, d\)"),
        (lambda: eigenvalue_bounds(torch.zeros(0, 0)), ValueError, "d >= 1"),
        (lambda: eigenvalue_bounds(torch.zeros(2, 3, 3)), ValueError, r"must be \(d, d\)"),
        (lambda: eigenvalue_bounds(torch.zeros(3, 3).int()), TypeError, "floating point"),
        (lambda: eigenvalue_bounds([[1.0]]), TypeError, "must be a tensor"),
        (lambda: eigenvalue_bounds(Residual()), TypeError, "use spectral_radius"),
        (
            lambda: eigenvalue_bounds(affine(weight="orthogonal")),
            ValueError,
            "not symmetric.*spectral_radius.*svdvals",
        ),
    ],
)
def test_input_that_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_every_form_of_a_weight():
    weight = Symmetric(20, 0.9)
    expected = eigenvalue_bounds(weight().detach())
    cell = AffineCell(3, 20, weight=weight)
    for form in (weight, weight(), cell, DEQLayer(cell)):
        assert eigenvalue_bounds(form) == expected
    with pytest.raises(ValueError, match="not symmetric"):
        eigenvalue_bounds(Orthogonal(20, 0.9))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weight_that_is_not_finite(bad):
    w = torch.eye(3)
    w[1, 1] = bad
    found = eigenvalue_bounds(w)
    assert math.isnan(found.lower)
    assert math.isnan(found.upper)
    assert not found.converged


def test_no_warnings_of_its_own():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectral_radius(affine(), torch.randn(2, 6))
        jacobian_norm(Residual(), torch.randn(2, 6))
        eigenvalue_bounds(Symmetric(5, 0.9))
