"""Weight families: scale, structure at initialisation and through training, gradients."""

import pytest
import torch

from fastdeq import AffineCell, Dense, DEQLayer, Orthogonal, Symmetric
from fastdeq.weights import orthogonal_factor


def orthogonality_error(w, scale):
    q = w.double() / scale
    return (q.T @ q - torch.eye(len(q), dtype=q.dtype)).abs().max().item()


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


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_parametrized_weights_keep_their_structure_for_a_thousand_steps(optimizer):
    orthogonal, symmetric = Orthogonal(24, 1.3), Symmetric(24, 1.3)
    target = torch.randn(24, 24)
    steps = optimizer([*orthogonal.parameters(), *symmetric.parameters()], lr=1e-2)
    start = orthogonal().detach()
    for _ in range(1000):
        steps.zero_grad()
        ((orthogonal() - target) ** 2).sum().add(((symmetric() - target) ** 2).sum()).backward()
        steps.step()
    assert (orthogonal().detach() - start).norm() > 0.1
    assert orthogonality_error(orthogonal().detach(), 1.3) < 1e-6
    assert torch.equal(symmetric(), symmetric().T)
    assert orthogonal.norm_bound() == 1.3
    assert orthogonal.tags == {"orthogonal"}
    assert symmetric.tags == {"symmetric"}


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


class LowRank(torch.nn.Module):
    """A user's weight: W = s A B^T, with a norm bound that holds at any time."""

    def __init__(self, features, rank):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(features, rank))
        self.b = torch.nn.Parameter(torch.randn(features, rank))

    def forward(self):
        return 0.8 * (self.a / self.a.norm()) @ (self.b / self.b.norm()).T

    def norm_bound(self):
        return 0.8


def test_user_weight_object_and_what_it_states():
    layer = DEQLayer(AffineCell(3, 10, weight=LowRank(10, 2)))
    layer(torch.randn(4, 3)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert layer.cell.structure().contraction == 0.8
    # A bound below one lets "auto" take plain iteration, which counts no rejects.
    assert layer.last_solution.rejects == {}


def test_scale_of_an_orthogonal_weight_travels_in_the_state_dict():
    source, target = Orthogonal(6, 0.9), Orthogonal(6, 0.3)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(), source())
    assert target.norm_bound() == pytest.approx(0.9, rel=1e-6)  # stored in the weight's dtype
    x = torch.func.functional_call(target, {k: v.clone() for k, v in source.state_dict().items()})
    assert torch.equal(x, source())
    assert set(Orthogonal(6, 0.9, parametrized=False).state_dict()) == {"weight"}


@pytest.mark.parametrize("scale", [-1.0, float("nan"), "a", None])
@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
def test_a_scale_that_is_none_says_what_is_needed(weight, scale):
    with pytest.raises(ValueError, match="finite scale >= 0"):
        AffineCell(4, 8, weight=weight, scale=scale)
