"""CholeskyQR2: orthogonality over condition numbers, what it says of failure, what it reads."""

import pytest
import torch
from factor_cases import check_factors, orthogonality_error
from torch.utils._python_dispatch import TorchDispatchMode

from fastdeq.backends import extension
from fastdeq.ops import cholesky_qr2 as cholesky_qr2_module
from fastdeq.ops import orthogonal_factor as factor
from fastdeq.ops.orthogonal_factor import factors, pull_back, pull_back_q
from fastdeq.weights import FactorCache

pytestmark = pytest.mark.skipif(bool(extension.why_missing), reason="no extension here")

both_precisions = pytest.mark.parametrize("wide", [True, False], ids=["wide", "as the input"])


def cholesky_qr2(a, check=True, wide=True):
    return torch.ops.fastdeq.cholesky_qr2(a, check, wide)


def with_spectrum(m, n, condition, spectrum, dtype=torch.float32):
    u = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    s = float(condition) ** -torch.linspace(0, 1, n, dtype=torch.float64)
    if spectrum == "one small":
        s = torch.where(s == s.amin(), s, 1.0)
    elif spectrum == "one large":
        s = torch.where(s == s.amax(), s, s.amin())
    return ((u * s) @ v.T).to(dtype)


@both_precisions
@pytest.mark.parametrize("spectrum", ["even", "one small", "one large"])
@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("shape", [(2, 2), (7, 3), (600, 8), (33, 33), (130, 130), (300, 257)])
def test_orthogonality_in_float32(shape, condition, spectrum, wide):
    a = with_spectrum(*shape, condition, spectrum)
    q, r, ok = cholesky_qr2(a, wide=wide)
    assert ok
    # Rounding a float64 Q moves entries by 2^-24, relatively, and |q_i|^2 by at most twice that.
    assert orthogonality_error(q) <= (1.2e-7 if wide else 1e-6)
    check_factors(a, q, r)


@pytest.mark.parametrize("spectrum", ["even", "one small", "one large"])
@pytest.mark.parametrize("condition", [1, 1e6, 1e12])
@pytest.mark.parametrize("shape", [(5, 5), (40, 33), (130, 130)])
def test_orthogonality_in_float64(shape, condition, spectrum):
    a = with_spectrum(*shape, condition, spectrum, torch.float64)
    q, r, ok = cholesky_qr2(a)
    assert ok
    assert orthogonality_error(q) <= 1e-14
    check_factors(a, q, r)


@both_precisions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_householder(dtype, wide):
    a = with_spectrum(90, 70, 20, "even", dtype)
    q, r, _ = cholesky_qr2(a, wide=wide)
    expected = factors(a.double(), "householder")
    # Both are condition * eps away, in norm, from the factors of A.
    bound = 20 * 8 * torch.finfo(dtype).eps
    for got, true in ((q, expected.q), (r, expected.r)):
        assert torch.linalg.matrix_norm(got.double() - true, 2) < bound
        # A planted error of 1e-3 in one entry is seen.
        off = got.double().clone()
        off[0, 1] += 1e-3
        assert torch.linalg.matrix_norm(off - true, 2) > bound


@both_precisions
@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e25, 1e37])
def test_no_scale_over_or_underflows(scale, wide):
    a = with_spectrum(40, 40, 10, "even")
    q, r, ok = cholesky_qr2(a * scale, wide=wide)
    assert ok
    assert orthogonality_error(q) <= 1e-6
    assert r.isfinite().all()
    assert (r.diagonal() > 0).all()


def hopeless(n):
    zero_column = torch.randn(n, n)
    zero_column[:, 1] = 0
    repeated = torch.randn(n, n)
    repeated[:, 1] = repeated[:, 0]
    yield from (torch.zeros(n, n), torch.ones(n, n), zero_column, repeated)
    yield torch.randn(n, 2) @ torch.randn(2, n)
    yield with_spectrum(n, n, 1e12, "even")
    for value in (torch.nan, torch.inf, -torch.inf):
        a = torch.eye(n)
        a[n - 1, 0] = value
        yield a


@both_precisions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [4, 70])
def test_what_is_said_to_be_good_is_good_and_the_rest_is_nan_throughout(n, dtype, wide):
    for k, a in enumerate(hopeless(n)):
        a = a.to(dtype)
        q, r, ok = cholesky_qr2(a, check=False, wide=wide)
        if ok:
            assert orthogonality_error(q) <= 1e-6, k
            check_factors(a, q, r)
        else:
            assert q.isnan().all(), k
            assert r.isnan().all(), k
    assert not cholesky_qr2(torch.zeros(n, n, dtype=dtype), wide=wide)[2]
    assert not cholesky_qr2(torch.full((n, n), torch.nan, dtype=dtype), wide=wide)[2]


def test_a_loss_of_orthogonality_that_two_passes_cannot_repair_is_noticed():
    # The first Cholesky factorisation runs through or not, by chance; never is a bad Q passed off.
    judged = []
    for condition in torch.logspace(6, 9, 40).tolist():
        q, _, ok = cholesky_qr2(with_spectrum(48, 48, condition, "one small"))
        judged.append(bool(ok))
        if ok:
            assert orthogonality_error(q) <= 1e-6, condition
    assert judged[0]
    assert not judged[-1]


@both_precisions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("check", [True, False])
def test_no_number_is_read_on_the_host(dtype, check, wide):
    # On the meta device there is none: an operator that reads one raises.
    a = torch.empty(9, 6, dtype=dtype, device="meta")
    with pytest.raises(RuntimeError):
        a.amax().item()
    q, r, ok = cholesky_qr2(a, check, wide)
    assert (q.shape, r.shape, ok.shape) == ((9, 6), (6, 6), ())
    assert (q.dtype, r.dtype, ok.dtype) == (dtype, dtype, torch.bool)


class CountReads(TorchDispatchMode):
    """Counts the numbers that Python code reads from tensors."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_factorisation_reads_one_number_and_none_while_capturing(monkeypatch):
    a = with_spectrum(200, 200, 10, "even")
    with CountReads() as count:
        factors(a, "cholesky_qr2")
    assert count.reads == 1
    with CountReads() as count:
        factors(a, "cholesky")
    assert count.reads > 1
    monkeypatch.setattr(factor, "is_capturing", lambda device: True)
    for method in ("auto", "cholesky_qr2"):
        with CountReads() as count:
            q = factors(a, method).q
        assert count.reads == 0
        assert orthogonality_error(q) <= 1e-6
    found = factors(torch.zeros(5, 5), "cholesky_qr2")
    assert found.q.isnan().all()
    assert found.r.isnan().all()


@pytest.mark.parametrize("shape", [(300, 300), (9, 5)])
def test_the_gradient_reads_no_number(shape):
    q, r, _ = cholesky_qr2(torch.randn(*shape))
    with CountReads() as count:
        pull_back_q(q, r, torch.randn_like(q))
        pull_back(q, r, torch.randn_like(q), torch.randn_like(r))
    assert count.reads == 0


def test_householder_follows_where_it_fails(monkeypatch):
    # As on a GPU, where "auto" is CholeskyQR2.
    original = factor.cholesky_qr2
    failed = []

    def counted(a, capturing):
        found = original(a, capturing)
        failed.append(found is None)
        return found

    monkeypatch.setattr(factor, "cholesky_qr2", counted)
    monkeypatch.setattr(factor, "prefers_cholesky_qr2", lambda a: True)
    for a in hopeless(20):
        q = factors(a).q
        # Sums of equal terms round worse than random ones: eps sqrt(n) per entry.
        assert q.isnan().all() if not a.isfinite().all() else orthogonality_error(q) < 4e-6
    assert sum(failed) >= 6
    failed.clear()
    factors(torch.eye(20))
    assert failed == [False]


def test_the_error_names_what_to_use():
    with pytest.raises(RuntimeError, match=r"too ill-conditioned.*'householder'"):
        factors(torch.zeros(4, 4), "cholesky_qr2")


def test_without_the_operator_other_methods_are_used(monkeypatch):
    monkeypatch.setattr(cholesky_qr2_module, "has_cholesky_qr2", lambda: False)
    a = torch.randn(6, 6)
    with pytest.raises(RuntimeError, match="needs the compiled extension"):
        factors(a, "cholesky_qr2")
    assert orthogonality_error(factors(a).q) <= 1e-6


@both_precisions
def test_autocast_gradients_and_tf32_do_not_reach_it(wide):
    a = with_spectrum(60, 60, 5, "even").requires_grad_()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16 products on some CPUs
        with torch.autocast("cpu", dtype=torch.bfloat16):
            q, r, ok = cholesky_qr2(a, wide=wide)
    finally:
        torch.set_float32_matmul_precision(before)
    assert ok
    assert orthogonality_error(q.detach()) <= 1e-6
    check_factors(a.detach(), q.detach(), r.detach())


@both_precisions
@pytest.mark.parametrize("shape", [(6, 4), (1, 1), (3, 0), (0, 0)])
def test_opcheck(shape, wide):
    torch.library.opcheck(torch.ops.fastdeq.cholesky_qr2, (torch.randn(*shape), False, wide))


def test_a_cache_uses_it_and_its_gradient(monkeypatch):
    monkeypatch.setattr(factor, "prefers_cholesky_qr2", lambda a: True)
    a = with_spectrum(30, 30, 5, "even", torch.float64).requires_grad_()
    g = torch.randn_like(a)
    cache = FactorCache()
    got = torch.autograd.grad((cache.orthogonal(a) * g).sum(), a)[0]
    q, r, _ = factors(a.detach(), "householder")
    torch.testing.assert_close(got, pull_back(q, r, g), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("a", "error", "message"),
    [
        (torch.ones(2, 3), ValueError, "m >= n"),
        (torch.ones(2, 3, 3), ValueError, "needs a matrix"),
        (torch.eye(3).half(), TypeError, "float32 or float64"),
    ],
)
def test_misuse(a, error, message):
    with pytest.raises(error, match=message):
        cholesky_qr2(a)
