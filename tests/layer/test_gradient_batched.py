"""``adjoint_limit`` with gradients that arrive batched."""

import torch
from tracked_cases import every_kind, problem, same, whole


@every_kind
def test_batched_gradients_are_limited_one_by_one(kind):
    layer, _, x = problem(kind, scale=0.9, adjoint_limit=1.0, keep_solutions=9)
    z = whole(layer(x))
    numbers = torch.Generator().manual_seed(1)
    grads = torch.randn(3, *z.shape, dtype=z.dtype, generator=numbers)
    expected = [torch.autograd.grad(z, x, g, retain_graph=True)[0] for g in grads]
    limited = torch.stack([s.limited for s in layer.solutions["adjoint"]])
    assert limited.any()
    assert not limited.all()
    (found,) = torch.autograd.grad(z, x, grads, is_grads_batched=True, retain_graph=True)
    last = layer.last_adjoint_solution
    assert last.limited is None or last.limited.shape == last.status.shape
    repr(last)
    same([found], [torch.stack(expected)], rtol=1e-9, atol=1e-9)
    z = whole(problem(kind, scale=0.9)[0](x))
    free = [torch.autograd.grad(z, x, g, retain_graph=True)[0] for g in grads]
    off = (torch.stack(free) - found).abs().amax(2)
    assert torch.equal(off > 1e-6, limited)
