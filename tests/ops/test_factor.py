"""The orthogonal factor: orthogonality and conditioning of each method, gradients, odd inputs."""

import pytest
import torch
from factor_cases import check_factors, orthogonality_error, with_condition

from fastdeq.backends import extension
from fastdeq.ops import gram_schmidt
from fastdeq.ops import orthogonal_factor as factor
from fastdeq.ops.orthogonal_factor import (
    CHOLESKY_FROM,
    METHODS,
    diagonal_inverses,
    factors,
    pull_back,
    pull_back_q,
)

op = torch.ops.fastdeq.orthogonal_factor
SIZE = CHOLESKY_FROM + 22  # not a multiple of a panel
needs_extension = pytest.mark.skipif(bool(extension.why_missing), reason="no extension here")
METHODS_HERE = [
    pytest.param(name, marks=needs_extension) if name == "cholesky_qr2" else name
    for name in METHODS
]


@pytest.mark.parametrize("shape", [(24, 24), (SIZE, SIZE), (2 * SIZE, SIZE), (512, 512)])
@pytest.mark.parametrize("condition", [1, 10, 100, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("method", METHODS_HERE)
def test_orthogonality_in_float32(method, shape, condition):
    # Householder without the pass after it reaches 1.1e-6 at n = 512.
    a = with_condition(*shape, condition)
    if method == "cholesky" and shape[0] == 24 and condition > 1e3:
        # All of it is in one panel, whose Gram matrix squares the condition number.
        return
    q, r = op(a, method)
    assert orthogonality_error(q) <= 1e-6
    check_factors(a, q, r)


@pytest.mark.parametrize("condition", [1, 1e4, 1e8, 1e12])
@pytest.mark.parametrize("method", METHODS_HERE)
def test_orthogonality_in_float64(method, condition):
    a = with_condition(SIZE, SIZE, condition, torch.float64)
    q, r = op(a, method)
    assert orthogonality_error(q) <= 1e-14
    check_factors(a, q, r)


def test_conditioning_limit_and_what_auto_does_beyond_it():
    a = with_condition(SIZE, SIZE, 1e9)
    with pytest.raises(RuntimeError, match=r"too ill-conditioned.*'householder'"):
        factors(a, "cholesky")
    for method in ("auto", "householder"):
        q, _, _ = factors(a, method)
        assert orthogonality_error(q) <= 1e-6


def awkward_matrices(n):
    """Matrices that classical Gram-Schmidt orthogonalises badly."""
    eye, upper = torch.eye(n), torch.ones(n, n).triu(1)
    q = torch.linalg.qr(torch.randn(n, n))[0]
    pair = q.clone()
    pair[:, n - 3] = pair[:, 5] + 1e-3 * pair[:, n - 3]  # two columns, panels apart
    graded = q * torch.logspace(0, -12, n)
    yield from (q @ (eye - c * upper) for c in (0.05, 0.1, 0.3, 1.0))  # |A| small, |R^-1| huge
    yield from (pair, graded, graded.flip(1), graded.T.contiguous(), torch.randn(n, n))
    yield 1 / (torch.arange(n)[:, None] + torch.arange(n) + 1.0)  # Hilbert
    yield from (1e-25 * q, 1e25 * q, 1e-38 * q)  # the Gram matrix under- or overflows
    yield torch.randn(n, n) @ torch.randn(n, n) @ torch.randn(n, n)
    yield torch.cat([q[:, : n // 2], q[:, : n // 2] + 1e-4 * torch.randn(n, n // 2)], 1)


@pytest.mark.parametrize("n", [SIZE + SIZE % 2, 320])
def test_auto_never_returns_a_bad_factor(n):
    for k, a in enumerate(awkward_matrices(n)):
        assert orthogonality_error(factors(a).q) <= 1.5e-6, k


def test_a_loss_of_orthogonality_is_measured_and_repaired(monkeypatch):
    # With no panel done twice, this is plain block Gram-Schmidt.
    a = with_condition(SIZE, SIZE, 100)
    monkeypatch.setattr(gram_schmidt, "_ETA", 1e9)
    bad = gram_schmidt.gram_schmidt(a)
    assert orthogonality_error(bad.q) > 2e-6
    assert not gram_schmidt.is_orthonormal(bad.q)
    q, r, _ = factors(a, "cholesky")
    assert orthogonality_error(q) <= 1e-6
    check_factors(a, q, r)
    # A loss too large for the first-order pass: Householder.
    monkeypatch.setattr(factor, "first_order_pass", lambda found: None)
    assert orthogonality_error(factors(a).q) <= 1e-6


@pytest.mark.parametrize("method", METHODS_HERE)
def test_methods_agree(method):
    a = with_condition(SIZE + 40, SIZE, 20, torch.float64)
    q, r, inverses = factors(a, method)
    expected_q, expected_r = torch.linalg.qr(a)
    sign = expected_r.diagonal().sign()
    torch.testing.assert_close(q, expected_q * sign, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(r, expected_r * sign[:, None], rtol=1e-11, atol=1e-12)
    if inverses is not None:
        torch.testing.assert_close(inverses, diagonal_inverses(r), rtol=1e-9, atol=1e-10)


def by_torch(a):
    q, r = torch.linalg.qr(a)
    sign = r.diagonal().sign().detach()
    return q * sign, r * sign[:, None]


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (1, 1), (6, 1), (SIZE, SIZE), (SIZE + 9, SIZE)])
@pytest.mark.parametrize("used", ["q", "r", "both"])
def test_gradient_equals_that_of_torch(shape, used):
    a = torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]
    a = (a + 0.02 * torch.randn_like(a)).requires_grad_()
    g, h = torch.randn_like(a), torch.randn(shape[1], shape[1], dtype=torch.float64)

    def gradient(f):
        q, r = f(a)
        terms = {"q": [q * g], "r": [r * h], "both": [q * g, r * h]}[used]
        return torch.autograd.grad(sum(t.sum() for t in terms), a)[0]

    expected = gradient(by_torch)
    torch.testing.assert_close(gradient(op), expected, rtol=1e-10, atol=1e-11 * expected.norm())


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (1, 1), (4, 1)])
def test_first_and_second_derivatives(shape):
    a = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    for f in (op, lambda a: op(a)[0], lambda a: op(a)[1]):
        assert torch.autograd.gradcheck(f, (a,))
        assert torch.autograd.gradgradcheck(f, (a,))


@pytest.mark.parametrize("n", [3, 64, SIZE, 300])
def test_fast_gradient_equals_the_differentiable_one(n):
    a = torch.eye(n, dtype=torch.float64) + 0.1 / n**0.5 * torch.randn(n, n, dtype=torch.float64)
    q, r, inverses = factors(a, "cholesky")
    g = torch.randn_like(a)
    expected = pull_back(q, r, g)
    for given in (None, inverses):
        torch.testing.assert_close(pull_back_q(q, r, g, given), expected, rtol=1e-10, atol=1e-11)
    # What the tolerances can see: one entry of R off by 1e-8.
    off = r.clone()
    off[0, 1] += 1e-8  # the last column of R has no part in it
    assert not torch.allclose(pull_back_q(q, off, g), expected, rtol=1e-10, atol=1e-11)


def test_gradient_in_float32_is_accurate():
    a = with_condition(256, 256, 10).requires_grad_()
    wide = a.detach().double().requires_grad_()
    g = torch.randn(256, 256)
    (op(a)[0] * g).sum().backward()
    (op(wide)[0] * g).sum().backward()
    error = (a.grad - wide.grad).norm() / wide.grad.norm()
    # Backward stable products, amplified by the condition number: measured 1e-6.
    assert error < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (0, 0), (3, 0)])
def test_opcheck(shape, dtype):
    a = torch.randn(*shape, dtype=dtype)
    for requires_grad in (False, True):
        torch.library.opcheck(op, (a.clone().requires_grad_(requires_grad), "auto"))


def test_opcheck_of_the_cholesky_form_and_the_gradient():
    a = torch.eye(SIZE) + 0.1 / SIZE**0.5 * torch.randn(SIZE, SIZE)
    torch.library.opcheck(op, (a.requires_grad_(), "cholesky"))
    q, r, _ = factors(a.detach())
    torch.library.opcheck(
        torch.ops.fastdeq.orthogonal_factor_backward, (q, r, torch.randn(q.shape))
    )


@pytest.mark.parametrize("n", [6, SIZE])
def test_compiles_without_graph_breaks(fresh_compiler, n):
    a = with_condition(n, n, 5).requires_grad_()

    def loss(a):
        q, r = op(a)
        return (q * torch.arange(float(n))).sum() + r[0, 0] * 0

    expected = torch.autograd.grad(loss(a), a)[0]
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(a), a)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [5, SIZE])
@pytest.mark.parametrize("method", METHODS_HERE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_in_is_nan_out(n, method, value):
    a = torch.eye(n)
    a[n - 1, 1] = value
    q, r = op(a, method)
    assert q.isnan().all()
    assert r.isnan().all()


@pytest.mark.parametrize("n", [5, SIZE])
def test_rank_deficient_matrices_have_an_orthogonal_factor(n):
    rank_two = torch.randn(n, 2) @ torch.randn(2, n)
    for a in (torch.zeros(n, n), torch.ones(n, n), rank_two):
        # Sums of equal terms round worse than random ones: eps sqrt(n) per entry.
        assert orthogonality_error(factors(a).q) < 4 * n**0.5 * torch.finfo(a.dtype).eps


@pytest.mark.parametrize("method", METHODS_HERE)
def test_one_column_one_row_and_no_entries(method):
    for value in (2.0, -3.0):
        q, r = op(torch.tensor([[value]]), method)
        torch.testing.assert_close(q, torch.tensor([[1.0]]) * (value > 0) * 2 - 1)
        torch.testing.assert_close(r, torch.tensor([[abs(value)]]))
    for shape in ((0, 0), (4, 0)):
        a = torch.empty(shape, requires_grad=True)
        q, r = op(a, method)
        assert (q.shape, r.shape) == (shape, (0, 0))
        q.sum().backward()
        assert a.grad.shape == shape


@pytest.mark.parametrize("n", [6, SIZE])
@pytest.mark.parametrize("method", METHODS_HERE)
def test_strides_do_not_matter(n, method):
    a = with_condition(n, n, 5)
    expected = op(a, method)
    wide = torch.zeros(n, 2 * n)
    wide[:, ::2] = a
    for same in (a.T.contiguous().T, wide[:, ::2]):
        got = op(same, method)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
            assert x.is_contiguous()


def test_autocast_does_not_reach_the_factorisation():
    a = with_condition(SIZE, SIZE, 5).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, r = op(a)
        q.sum().backward()
    assert orthogonality_error(q.detach()) <= 1e-6
    expected = torch.autograd.grad(op(a)[0].sum(), a)[0]
    torch.testing.assert_close(a.grad, expected)
    assert r.dtype == torch.float32


@pytest.mark.parametrize(
    ("a", "method", "error", "message"),
    [
        (torch.eye(3), "qr", ValueError, "unknown method 'qr'"),
        (torch.ones(2, 3), "auto", ValueError, r"m >= n, got \(2, 3\)"),
        (torch.ones(2, 3, 3), "auto", ValueError, "needs a matrix"),
        (torch.eye(3).half(), "auto", TypeError, "float32 or float64"),
    ],
)
def test_misuse(a, method, error, message):
    with pytest.raises(error, match=message):
        op(a, method)
