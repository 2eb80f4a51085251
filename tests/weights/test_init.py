"""fastdeq.init: the statistics of what it draws, and what it draws for."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastdeq
from fastdeq import AffineCell, Dense, Orthogonal, Symmetric, SymmetricMap, init

D, SCALE = 256, 0.8
FAMILIES = {"dense": init.dense_, "orthogonal": init.orthogonal_, "symmetric": init.symmetric_}
families = pytest.mark.parametrize("family", FAMILIES)


def close(a, b, error):
    torch.testing.assert_close(a, b, rtol=error, atol=error)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(family, **options):
    w = torch.empty(D, D, dtype=torch.float64)
    assert FAMILIES[family](w, SCALE, generator=seeded(), **options) is w
    return w


# The mean square of N independent normal entries has relative deviation sqrt(2 / N); five of them.
# d (d - 1) / 2 entries are independent in a symmetric matrix. s Q has it exactly.
DEVIATION = 5 * math.sqrt(2 / (D * (D - 1) / 2))


@pytest.mark.parametrize("convention", ["spectral_radius", "variance"])
@families
def test_mean_squares(family, convention):
    w = drawn(family, convention=convention)
    halved = family == "symmetric" and convention == "spectral_radius"
    expected = SCALE**2 / D / (4 if halved else 1)
    off = w[~torch.eye(D, dtype=torch.bool)]
    # An orthogonal one misses the diagonal here: d of d^2 entries, of twice the mean at most.
    assert off.square().mean() == pytest.approx(expected, rel=DEVIATION + 2 / D)
    if family == "symmetric":
        ratio = w.diagonal().square().mean() / expected
        assert ratio == pytest.approx(2, rel=5 * math.sqrt(2 / D))


@families
def test_spectra(family):
    """Edges of the semicircle fluctuate by d^(-2/3), the circle's by about sqrt(log d / d)."""
    w = drawn(family)
    radius = float(torch.linalg.eigvals(w).abs().max())
    if family == "orthogonal":
        close(w @ w.T, SCALE**2 * torch.eye(D, dtype=w.dtype), 1e-13)
    elif family == "symmetric":
        assert torch.equal(w, w.T)
        assert radius == pytest.approx(SCALE, rel=4 * D ** (-2 / 3))
        wide = drawn(family, convention="variance")
        assert torch.linalg.eigvalsh(wide).abs().max() == pytest.approx(2 * radius, rel=1e-12)
    else:
        assert radius == pytest.approx(SCALE, rel=math.sqrt(math.log(D) / D))


@pytest.mark.parametrize(("family", "kind"), [("dense", Dense), ("symmetric", Symmetric)])
def test_second_moments_are_those_of_the_weight_modules(family, kind):
    torch.manual_seed(0)
    module = kind(D, SCALE, dtype=torch.float64)().detach()
    ours = drawn(family)
    for part in (lambda w: w.square().mean(), lambda w: w.diagonal().square().mean()):
        error = 10 * math.sqrt(2 / D)  # both random; the diagonal has d entries
        assert part(ours) == pytest.approx(float(part(module)), rel=error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@families
def test_half_precision_is_drawn_in_float32_and_rounded(family, dtype):
    w, exact = torch.empty(32, 32, dtype=dtype), torch.empty(32, 32)
    for t in (w, exact):
        FAMILIES[family](t, SCALE, generator=seeded())
    assert torch.equal(w, exact.to(dtype))


@families
def test_the_generator_decides_and_nothing_else(family):
    before = torch.get_rng_state()
    a, b = (FAMILIES[family](nn.Linear(8, 8), 1.0, generator=seeded(s)) for s in (3, 3))
    assert torch.equal(a.weight, b.weight)
    torch.set_rng_state(before)
    x = nn.Linear(8, 8)  # draws as much as above from the global state
    torch.set_rng_state(before)
    y = nn.Linear(8, 8)
    assert torch.equal(x.weight, y.weight)
    init.initialize_(y, family, 1.0)  # the global one
    assert not torch.equal(x.weight, y.weight)
    assert y.weight.requires_grad
    assert y.weight.grad_fn is None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(12, 12)
        self.pack = nn.Linear(12, 36)
        self.head = nn.Linear(12, 5)
        self.table = nn.Embedding(12, 12)
        self.conv = nn.Conv2d(12, 12, 3, padding=1)


def changed(module, call):
    before = {name: t.clone() for name, t in module.named_parameters()}
    call(module)
    return {name for name, t in module.named_parameters() if not torch.equal(t, before[name])}


def test_what_counts_as_square():
    def call(**options):
        return lambda block: init.orthogonal_(block, 0.9, **options)

    both = {"mix.weight", "conv.weight"}
    assert changed(Block(), call()) == both
    assert changed(Block(), call(blocks=True)) == both | {"pack.weight"}
    assert changed(Block(), call(names="mix.*")) == {"mix.weight"}
    assert changed(Block(), call(names=["mix.*", "conv.*"])) == both
    assert changed(Block(), call(names=lambda name: "conv" in name)) == {"conv.weight"}
    attention = nn.MultiheadAttention(12, 3)
    names = {"in_proj_weight", "out_proj.weight"}
    assert changed(attention, call(blocks=True)) == names
    for block in attention.in_proj_weight.detach().split(12):
        close(block @ block.T, 0.81 * torch.eye(12), 1e-5)
    assert changed(nn.LSTM(7, 12), call(blocks=True)) == {"weight_hh_l0"}


def test_a_wide_matrix_has_blocks_side_by_side():
    wide = init.symmetric_(torch.empty(4, 12), 1.0, blocks=True)
    for block in wide.split(4, 1):
        assert torch.equal(block, block.T)


def test_a_convolution_has_the_spectrum_of_its_centre():
    conv = init.orthogonal_(nn.Conv2d(6, 6, (3, 5), padding=(1, 2), bias=False), 0.7)
    x = torch.randn(2, 6, 8, 8)
    y = conv(x).detach()
    # Norms at each position are scaled by 0.7; sums of 6 products.
    close(y.norm(dim=1), 0.7 * x.norm(dim=1), 1e-5)
    assert int((conv.weight != 0).sum()) == 36
    kernel = init.dense_(torch.ones(6, 6, 3), 0.7)
    assert not kernel[..., (0, 2)].any()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (nn.Linear(3, 4), {}, r"no square weight.*weight \(4, 3\) is not square"),
        (nn.Linear(4, 12), {}, r"3 square blocks: pass blocks=True"),
        (nn.ReLU(), {}, "no matrices at all"),
        (nn.Conv2d(4, 4, 2), {}, "even size"),
        (nn.Conv2d(4, 4, 3, groups=2), {}, "groups"),
        (nn.ConvTranspose2d(4, 4, 3), {}, "neither a matrix nor the kernel"),
        (nn.Embedding(4, 4), {}, "table of embeddings"),
        (nn.Linear(4, 4), {"names": "mix"}, r"is square, but not among names='mix'"),
        (nn.LazyLinear(4), {}, "has no shape yet"),
        (torch.ones(3, 4), {}, r"shape \(3, 4\) is not square"),
        (torch.ones(4), {}, "is no matrix"),
        (torch.ones(0, 0), {}, "is empty"),
        (torch.ones(4, 4), {"names": "mix"}, "this target is a tensor"),
        (torch.ones(4, 4), {"scale": -1.0}, "scale must be a finite number >= 0"),
        (torch.ones(4, 4), {"scale": math.nan}, "scale must be"),
        (torch.ones(4, 4), {"scale": "0.9"}, "scale must be"),
        (torch.ones(4, 4), {"convention": "norm"}, "unknown convention 'norm'.*radius"),
        (torch.ones(4, 4), {"family": "haar"}, "unknown family 'haar'"),
        (AffineCell(4, 4, weight="symmetric"), {}, "keeps its own structure"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, (nn.Module, torch.Tensor)) else None,
)
def test_refused(target, options, message):
    with pytest.raises(ValueError, match=message):
        init.initialize_(target, **{"family": "orthogonal", "scale": 0.9} | options)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.ones(4, 4, dtype=torch.complex64), "dtype torch.complex64; it must be real"),
        (nn.Linear(4, 4, dtype=torch.complex64), "weight has dtype torch.complex64"),
        (torch.ones(4, 4, dtype=torch.int64), "torch.int64"),
        ([[1.0]], "not list"),
    ],
    ids=["complex", "complex module", "integers", "list"],
)
def test_refused_kinds(target, message):
    with pytest.raises(TypeError, match=message):
        init.dense_(target, 0.9)


def test_refused_names():
    with pytest.raises(TypeError, match="names must be a pattern"):
        init.dense_(nn.Linear(4, 4), 0.9, names=[3])


@families
def test_meta_tensors_have_nothing_to_draw(family):
    before = torch.get_rng_state()
    module = nn.Linear(4, 4, device="meta")
    generator = seeded()
    assert init.initialize_(module, family, 0.9, generator=generator) is module
    assert torch.equal(generator.get_state(), seeded().get_state())
    parametrize.register_parametrization(module, "weight", SymmetricMap())
    assert init.initialize_(module, family, 0.9).weight.device.type == "meta"
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="not square"):
        init.initialize_(nn.Linear(4, 5, device="meta"), family, 0.9)


def test_exported():
    assert fastdeq.init is init
    assert isinstance(init.dense_(nn.Parameter(torch.ones(2, 2)), 1.0), nn.Parameter)
    assert Orthogonal(4, 0.5).scale == 0.5
