"""Weight families: scale, structure at initialisation and through training, gradients."""

import pytest
import torch

from fastdeq import AffineCell, Dense, DEQLayer, Orthogonal, Symmetric
from fastdeq.weights import orthogonal_factor


def orthogonality_error(w, scale):
    q = w.double() / scale
    return (q.T @ q - torch.eye(len(q), dtype=q.dtype)).abs().max().item()


def largest_eigenvalue(w):
    return torch.linalg.eigvalsh(w.detach().double())[-1].item()


def spectral_radius(w):
    return torch.linalg.eigvals(w.double()).abs().max().item()


@pytest.mark.parametrize(
    ("family", "finite_size"), [(Dense, 0.12), (Orthogonal, 1e-6), (Symmetric, 0.06)]
)
@pytest.mark.parametrize("parametrized", [True, False])
def test_scale_is_the_spectral_radius(family, finite_size, parametrized):
    # At d = 400 the edge fluctuates: sqrt(log d / d) / 2 for dense, 2 d^-2/3 for symmetric.
    options = {} if family is Dense else {"parametrized": parametrized}
    w = family(400, 0.9, **options)().detach()
    assert spectral_radius(w) == pytest.approx(0.9, rel=finite_size)


def test_entry_variances():
    d, s = 500, 0.8
    off = ~torch.eye(d, dtype=torch.bool)
    dense, symmetric = Dense(d, s)().detach(), Symmetric(d, s)().detach()
    # Relative standard error of a variance from k entries: sqrt(2 / k); 5 of them allowed.
    assert dense.var().item() == pytest.approx(s**2 / d, rel=5 * (2 / d**2) ** 0.5)
    assert symmetric[off].var().item() == pytest.approx(s**2 / (4 * d), rel=5 * (4 / d**2) ** 0.5)
    assert symmetric.diagonal().var().item() == pytest.approx(
        s**2 / (2 * d), rel=5 * (2 / d) ** 0.5
    )


def test_orthogonal_factor_is_unique_and_haar():
    raw = torch.randn(2000, 3, 3, dtype=torch.float64)
    q = torch.stack([orthogonal_factor(r) for r in raw])
    # Scaling rows of R by positive numbers changes nothing; Q itself is a fixed point.
    torch.testing.assert_close(orthogonal_factor(q[0]), q[0])
    torch.testing.assert_close(
        orthogonal_factor(raw[0] * torch.tensor([2.0, 0.5, 7.0])), q[0], rtol=1e-9, atol=1e-9
    )
    # Haar: E q_ij = 0, E q_ij^2 = 1/3, E (trace)^2 = 1, both signs of the determinant.
    assert q.mean(0).abs().max() < 5 * (1 / 3 / 2000) ** 0.5
    assert ((q**2).mean(0) - 1 / 3).abs().max() < 5 * 0.3 / 2000**0.5
    trace = q.diagonal(dim1=1, dim2=2).sum(1)
    assert (trace**2).mean().item() == pytest.approx(1.0, abs=5 * 1.5 / 2000**0.5)
    assert 0.4 < (torch.linalg.det(q) > 0).double().mean() < 0.6


@pytest.mark.parametrize("family", [Orthogonal, Symmetric])
def test_gradient_with_respect_to_the_raw_parameter(family):
    module = family(4, 0.7, dtype=torch.float64)
    raw = module.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(module.compose, (raw,))
    assert torch.autograd.gradgradcheck(module.compose, (raw,))


@pytest.mark.parametrize("features", [24, 160])  # 160: the blocked factorisation
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_parametrized_weights_keep_their_structure_for_a_thousand_steps(optimizer, features):
    orthogonal, symmetric = Orthogonal(features, 1.3), Symmetric(features, 1.3)
    bounded = Symmetric(features, 1.3, max_eigenvalue=0.99)
    modules = (orthogonal, symmetric, bounded)
    target = torch.randn(features, features)
    steps = optimizer([p for m in modules for p in m.parameters()], lr=1e-2)
    start = orthogonal().detach()
    for _ in range(1000):
        steps.zero_grad()
        sum(((m() - target) ** 2).sum() for m in modules).backward()
        steps.step()
    assert (orthogonal().detach() - start).norm() > 0.1
    assert orthogonality_error(orthogonal().detach(), 1.3) < 1e-6
    for m in (symmetric, bounded):
        assert torch.equal(m(), m().T)
        assert m.tags == {"symmetric"}
    assert largest_eigenvalue(bounded()) <= 0.99
    assert largest_eigenvalue(symmetric()) > 0.99
    assert orthogonal.norm_bound() == 1.3
    assert orthogonal.tags == {"orthogonal"}
    assert symmetric.eigenvalue_bound() is None
    assert bounded.eigenvalue_bound() == 0.99


def test_the_parameter_of_an_orthogonal_weight_starts_at_its_factor():
    module = Orthogonal(200, 0.9)
    assert orthogonality_error(module.weight.detach(), 1.0) < 1e-6
    torch.testing.assert_close(module(), 0.9 * module.weight, rtol=1e-5, atol=1e-6)
    # Haar, as from a Gaussian matrix: E q_ij^4 = 3 / (d (d + 2)), and the entries' signs are fair.
    q = torch.cat([Orthogonal(30, 1.0)().detach().flatten() for _ in range(200)])
    assert (q**4).mean().item() == pytest.approx(3 / (30 * 32), rel=0.05)
    assert q.mean().abs() < 5 / 30**0.5 / len(q) ** 0.5


def test_learned_scale_starts_where_told_and_stays_inside_its_bound():
    module = Orthogonal(12, 0.7, max_scale=0.99)
    assert orthogonality_error(module().detach(), 0.7) < 2e-6
    assert module.norm_bound() == 0.99
    assert type(module.norm_bound()) is float
    assert set(dict(module.named_parameters())) == {"weight", "raw_scale"}
    steps = torch.optim.SGD(module.parameters(), lr=10.0)
    for _ in range(200):
        steps.zero_grad()
        (-module().square().sum()).backward()
        steps.step()
    assert 0.98 < module.current_scale() <= 0.99
    assert torch.linalg.matrix_norm(module().detach().double(), 2) <= 0.99 * (1 + 1e-6)
    module.raw_scale.data.fill_(1e4)
    assert module.current_scale().item() <= 0.99
    module.raw_scale.data.fill_(-1e4)
    assert module().abs().max() == 0
    module.reset_parameters()
    assert module.current_scale().item() == pytest.approx(0.7, rel=1e-6)


def test_learned_scale_has_gradients_and_travels_in_the_state_dict():
    module = Orthogonal(4, 0.6, max_scale=0.9, dtype=torch.float64)

    def weight(raw, raw_scale):
        return torch.func.functional_call(module, {"weight": raw, "raw_scale": raw_scale})

    inputs = [p.detach().clone().requires_grad_() for p in (module.weight, module.raw_scale)]
    assert torch.autograd.gradcheck(weight, inputs)
    assert torch.autograd.gradgradcheck(weight, inputs)
    twin = Orthogonal(4, 0.1, max_scale=0.3, dtype=torch.float64)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(), module())
    assert twin.norm_bound() == 0.9
    layer = DEQLayer(AffineCell(3, 4, weight=Orthogonal(4, 0.5, max_scale=0.9)))
    assert layer.cell.structure().contraction == 0.9
    layer(torch.randn(2, 3)).sum().backward()
    assert layer.cell.weight.raw_scale.grad.abs() > 0


def test_learned_scale_in_bfloat16():
    module = Orthogonal(8, 0.5, max_scale=0.99).bfloat16()
    assert module().dtype == torch.bfloat16
    module().sum().backward()
    assert module.raw_scale.grad.isfinite()


@pytest.mark.parametrize(
    ("scale", "max_scale"),
    [(0.9, 0.9), (1.0, 0.99), (0.0, 0.9), (-0.5, 0.9), (0.5, float("inf")), (0.5, float("nan"))],
)
def test_learned_scale_outside_its_bound(scale, max_scale):
    with pytest.raises(ValueError, match="0 < scale < max_scale"):
        Orthogonal(4, scale, max_scale=max_scale)


def test_bounds_need_a_parametrisation():
    with pytest.raises(ValueError, match="parametrized=True"):
        Orthogonal(4, 0.5, max_scale=0.9, parametrized=False)
    with pytest.raises(ValueError, match="parametrized=True"):
        Symmetric(4, 0.5, max_eigenvalue=0.9, parametrized=False)
    with pytest.raises(ValueError, match="max_eigenvalue must be positive"):
        Symmetric(4, 0.5, max_eigenvalue=-1.0)
    assert Symmetric(4, 0.5, parametrized=False).eigenvalue_bound() is None


def test_a_bounded_symmetric_weight_has_one_equilibrium():
    # z -> z + a (tanh(W z + c) - z) with a small a converges from anywhere.
    w = Symmetric(30, 6.0, max_eigenvalue=0.9, dtype=torch.float64)().detach()
    assert torch.linalg.eigvalsh(w)[0] < -0.5
    c = torch.randn(30, dtype=torch.float64)
    z = 5 * torch.randn(3, 30, dtype=torch.float64)
    for _ in range(4000):
        z = z + 0.1 * (torch.tanh(z @ w + c) - z)
    torch.testing.assert_close(z, z[:1].expand(3, 30), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", [Orthogonal, Symmetric])
def test_only_initialised_weights_start_structured_and_claim_nothing(family):
    module = family(16, 0.9, parametrized=False)
    w = module()
    assert w is module.weight
    if family is Orthogonal:
        assert orthogonality_error(w.detach(), 0.9) < 1e-6
    else:
        assert torch.equal(w, w.T)
    assert module.tags == frozenset()
    assert module.norm_bound() is None
    x = torch.randn(8, 16)
    layer = DEQLayer(AffineCell(16, 16, weight=module))
    layer(x).pow(2).sum().backward()
    with torch.no_grad():
        module.weight -= 0.1 * module.weight.grad
    assert not torch.equal(module(), module().T)


def test_orthogonal_weight_in_bfloat16():
    module = Orthogonal(16, 0.9).bfloat16()
    w = module()
    assert w.dtype == torch.bfloat16
    # Entries below 1 rounded to 8 bits: 16 terms of 2^-9 each, twice.
    assert orthogonality_error(w.detach(), 0.9) < 16 * 2**-8
    w.sum().backward()
    assert module.weight.grad.isfinite().all()


def test_scale_of_an_orthogonal_weight_travels_in_the_state_dict():
    source, target = Orthogonal(6, 0.9), Orthogonal(6, 0.3)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(), source())
    assert target.norm_bound() == pytest.approx(0.9, rel=1e-6)  # stored in the weight's dtype
    x = torch.func.functional_call(target, {k: v.clone() for k, v in source.state_dict().items()})
    assert torch.equal(x, source())
    assert set(Orthogonal(6, 0.9, parametrized=False).state_dict()) == {"weight"}


@pytest.mark.parametrize("scale", [-1.0, float("nan"), "a"])
@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
def test_a_scale_that_is_none_says_what_is_needed(weight, scale):
    with pytest.raises(ValueError, match="finite scale >= 0"):
        AffineCell(4, 8, weight=weight, scale=scale)
