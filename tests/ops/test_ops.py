"""The operators: registration, and the C++ Anderson mix against its specification."""

import pytest
import torch
from engine_cases import Adjoint, Call, Forward

from fastdeq import BackendError
from fastdeq.backends import extension
from fastdeq.ops import anderson_mix
from fastdeq.solvers import GMRES, Anderson, Neumann, Picard

needs_extension = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)
SHAPES = [(7, 6, 33), (1, 2, 1), (64, 6, 128), (5, 4, 2), (3, 9, 1000), (2, 21, 17), (0, 6, 8)]


def mix_inputs(batch, slots, size, dtype, *, spread=1.0):
    """Histories as a converging iteration leaves them: entries shrink towards a limit."""
    decay = torch.logspace(0, -spread, slots, dtype=torch.float64)[None, :, None]
    g = (torch.randn(batch, slots, size, dtype=torch.float64) * decay).to(dtype)
    f = (torch.randn(batch, 1, size, dtype=torch.float64) + g.double()).to(dtype)
    gram = torch.einsum("bin,bjn->bij", g.double(), g.double())
    count = torch.randint(0, slots, (batch,), dtype=torch.int32)
    return f, g, gram, count


def options(slot=1, damping=0.8, regularization=1e-12, rank_tolerance=1e-10, max_weight=1e8):
    return slot, damping, regularization, rank_tolerance, max_weight


def bound(f, g, slot, ridge):
    """How far two correct results may differ, per sample ``(B, 1)``.

    Both run the same float64 algorithm. Their inner products differ by n eps64 relative to the
    largest one, which the subtraction dg_i = g_k - g_i magnifies by (|g| / |dg|)^2 and the small
    system by its condition number, at most 1 / smallest^2 for unit columns. Then m terms of size
    |gamma| |df| are rounded to the dtype.
    """
    slots, n = g.shape[1:]
    others = [j for j in range(slots) if j != slot]
    g, newest = g.double(), g[:, slot : slot + 1].double()
    difference = (newest - g)[:, others]
    length = difference.norm(dim=2).clamp(min=1e-300)
    singular = torch.linalg.svdvals(difference / length.unsqueeze(2))
    rank_deficient = slots - 1 > n
    smallest = (singular.amin(1) * (not rank_deficient)).clamp(min=ridge**0.5)
    gamma = newest.norm(dim=2) / length.amin(1, keepdim=True) / smallest[:, None]
    cancellation = (g.norm(dim=2).amax(1) / length.amin(1)) ** 2 / smallest**2
    rounding = 4 * slots * torch.finfo(f.dtype).eps
    size = f.double().abs().amax((1, 2)) + difference.abs().amax((1, 2))
    exact = n * torch.finfo(torch.float64).eps * cancellation
    return (rounding + exact)[:, None] * (1 + gamma) * size[:, None]


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("damping", [1.0, 0.7])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_cpp_mix_matches_the_reference(dtype, shape, damping, layout):
    f, g, gram, count = mix_inputs(*shape, dtype)
    # More differences than dimensions: a ridge that keeps the small system well conditioned.
    ridge = 1e-6 if shape[1] - 1 > shape[2] else 1e-12
    arguments = options(slot=shape[1] // 2, damping=damping, regularization=ridge)
    if layout == "strided":
        f, g = (torch.stack([t, torch.full_like(t, torch.nan)], 3)[..., 0] for t in (f, g))
        gram = gram.transpose(1, 2)
        count = torch.stack([count, count - 9], 1)[:, 0]
    ours, exact = gram.clone(), gram.clone()
    z, dropped, rejected = torch.ops.fastdeq.anderson_mix(f, g, ours, count, *arguments)
    z_ref, dropped_ref, rejected_ref = anderson_mix.reference(f, g, exact, count, *arguments)
    assert torch.equal(dropped, dropped_ref)
    assert torch.equal(rejected, rejected_ref)
    error = (z.double() - z_ref.double()).abs()
    assert (error <= bound(f, g, arguments[0], arguments[2])).all()
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)


@needs_extension
@pytest.mark.parametrize("plant", ["stale gram", "wrong slot", "wrong count", "damping"])
def test_the_comparison_sees_a_planted_error(plant):
    f, g, gram, count = mix_inputs(16, 6, 33, torch.float32)
    count[:] = 4
    arguments = list(options(slot=2, damping=0.8))
    good, *_ = anderson_mix.reference(f, g, gram.clone(), count, *arguments)
    allowed = bound(f, g, arguments[0], arguments[2])
    if plant == "stale gram":
        gram[:, 0, 1] *= 1.01
    elif plant == "wrong slot":
        f = f.roll(1, dims=1)
    elif plant == "wrong count":
        count = count - 1
    else:
        arguments[1] = 0.801
    bad, *_ = torch.ops.fastdeq.anderson_mix(f, g, gram, count, *arguments)
    assert ((bad.double() - good.double()).abs() > allowed).any()


IMPLEMENTATIONS = {"reference": anderson_mix.reference}
if extension.module is not None:
    IMPLEMENTATIONS["cpp"] = torch.ops.fastdeq.anderson_mix


@pytest.mark.parametrize("mix", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
class TestEveryForm:
    def test_minimises_the_residual(self, mix):
        """Against float64 least squares on the differences themselves, not on their products."""
        f, g, gram, count = mix_inputs(5, 4, 20, torch.float64)
        count[:] = 3
        z, dropped, rejected = mix(
            f, g, gram, count, *options(slot=0, damping=1.0, regularization=0)
        )
        df, dg = f[:, :1] - f[:, 1:], g[:, :1] - g[:, 1:]
        gamma = torch.linalg.lstsq(dg.transpose(1, 2), g[:, 0].unsqueeze(2)).solution.squeeze(2)
        exact = f[:, 0] - torch.einsum("bm,bmn->bn", gamma, df)
        # The normal equations square the condition number, here below 1e3: 1e6 eps.
        torch.testing.assert_close(z, exact, rtol=0, atol=1e-9)
        assert not dropped.any()
        assert not rejected.any()

    def test_one_nan_sample_leaves_the_others_bitwise_alone(self, mix):
        f, g, gram, count = mix_inputs(6, 5, 40, torch.float32)
        clean, *_ = mix(f, g, gram.clone(), count, *options())
        f[2], g[2], gram[2] = torch.nan, torch.nan, torch.nan
        dirty, *_ = mix(f, g, gram, count, *options())
        others = [0, 1, 3, 4, 5]
        assert torch.equal(clean[others], dirty[others])

    def test_poisoned_unused_slots_never_enter(self, mix):
        f, g, gram, count = mix_inputs(4, 6, 30, torch.float32)
        count[:] = 2  # slots 1, 0 and 5 are in use
        clean, *_ = mix(f, g, gram.clone(), count, *options(slot=1))
        unused = [2, 3, 4]
        f[:, unused], g[:, unused] = torch.nan, torch.inf
        gram[:, unused, :], gram[:, :, unused] = torch.nan, torch.nan
        dirty, dropped, rejected = mix(f, g, gram, count, *options(slot=1))
        assert torch.equal(clean, dirty)
        assert not dropped.any()
        assert not rejected.any()

    def test_repeated_columns_are_dropped_and_counted(self, mix):
        f, g, gram, count = mix_inputs(3, 4, 10, torch.float64)
        for t in (f, g):
            t[:, 2] = t[:, 3]
        gram = g @ g.transpose(1, 2)
        count[:] = 3
        _, dropped, rejected = mix(f, g, gram, count, *options(slot=0, regularization=0.0))
        assert dropped.tolist() == [1, 1, 1]
        assert not rejected.any()

    def test_identical_history_falls_back_to_the_plain_step(self, mix):
        f, g, gram, count = mix_inputs(3, 4, 10, torch.float32)
        f[:], g[:] = f[:, :1].clone(), g[:, :1].clone()
        gram = g.double() @ g.double().transpose(1, 2)
        count[:] = 3
        z, dropped, _ = mix(f, g, gram, count, *options(slot=0, damping=1.0))
        assert torch.equal(z, f[:, 0])
        assert dropped.tolist() == [3, 3, 3]

    def test_weight_cap_rejects_to_the_plain_step(self, mix):
        f, g, gram, count = mix_inputs(3, 4, 10, torch.float64)
        count[:] = 3
        z, _, rejected = mix(f, g, gram, count, *options(slot=0, damping=0.5, max_weight=1e-3))
        assert rejected.all()
        torch.testing.assert_close(z, f[:, 0] - 0.5 * g[:, 0])


@needs_extension
def test_cpp_mix_refuses_what_does_not_fit():
    f, g, gram, count = mix_inputs(3, 4, 10, torch.float32)
    mix = torch.ops.fastdeq.anderson_mix
    with pytest.raises(RuntimeError, match=r"both be \(B, m, n\)"):
        mix(f, g[:, :3], gram, count, *options())
    with pytest.raises(RuntimeError, match="gram must be float64"):
        mix(f, g, gram.float(), count, *options())
    with pytest.raises(RuntimeError, match="count must be int32"):
        mix(f, g, gram, count.long(), *options())
    with pytest.raises(RuntimeError, match=r"newest 4 is not in \[0, 4\)"):
        mix(f, g, gram, count, *options(slot=4))
    with pytest.raises(RuntimeError, match="differ in dtype"):
        mix(f, g.double(), gram, count, *options())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_anderson_mix(dtype):
    f, g, gram, count = mix_inputs(3, 4, 10, dtype)
    torch.library.opcheck(torch.ops.fastdeq.anderson_mix, (f, g, gram, count, *options()))


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=repr)
def test_opcheck_solve_affine(dtype, solver, engine):
    w, c = (0.1 * torch.randn(5, 5)).to(dtype), torch.randn(3, 5).to(dtype)
    arguments = Forward(w, c, "tanh", torch.zeros_like(c)).arguments(Call(solver, 1e-3, 20), engine)
    torch.library.opcheck(torch.ops.fastdeq.solve_affine.default, arguments)


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("solver", [Neumann(), GMRES(), Anderson()], ids=repr)
def test_opcheck_solve_affine_adjoint(dtype, solver, engine):
    w, g = (0.1 * torch.randn(5, 5)).to(dtype), torch.randn(3, 5).to(dtype)
    arguments = Adjoint(w, torch.rand_like(g), g).arguments(Call(solver, 1e-3, 20), engine)
    torch.library.opcheck(torch.ops.fastdeq.solve_affine_adjoint.default, arguments)


def test_an_engine_that_is_not_there_is_an_error_with_the_names():
    case, call = Forward(0.1 * torch.eye(3), torch.randn(2, 3)), Call(Picard(), 1e-3, 20)
    with pytest.raises(ValueError, match="unknown engine 'fast'; valid choices: 'cpp'"):
        case.run(call, "fast")
    with pytest.raises(BackendError, match="backend='cuda' is not available for this solve"):
        case.run(call, "cuda")  # a backend's name: as a compiled layer on a GPU passes it
    with pytest.raises(BackendError, match="no engine 'persistent' for tensors on cpu"):
        case.run(call, "persistent")


def test_there_are_ten_operators():
    """Each with its own opcheck: here, in test_factor.py, test_gmres_step.py, test_cholesky_qr.py
    and, for what only tests use, test_vector_math.py."""
    schemas = torch._C._jit_get_all_schemas()
    names = sorted(s.name for s in schemas if s.name.startswith("fastdeq::"))
    in_cpp = ["fastdeq::cholesky_qr2", "fastdeq::engine_activation"] if extension.module else []
    expected = ["anderson_mix", "gmres_step", "orthogonal_factor", "orthogonal_factor_backward"]
    expected += ["pack_weight", "solve_affine", "solve_affine_adjoint", "symmetric_part"]
    assert names == sorted(in_cpp + [f"fastdeq::{name}" for name in expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_symmetric_part(dtype):
    a = torch.randn(5, 5, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.fastdeq.symmetric_part, (a,))
