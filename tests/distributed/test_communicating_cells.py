"""A cell that exchanges something in each evaluation is evaluated equally often everywhere, given
fixed counts."""

import torch
from distributed_cases import RANKS
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce

from fastdeq import DEQLayer, Neumann, Picard

NODES, SIZE = 6, 3


class Coupled(nn.Module):
    """Nodes that see the mean of all, of which each process has some."""

    def __init__(self, total):
        super().__init__()
        torch.manual_seed(1)
        self.own, self.shared = (nn.Linear(SIZE, SIZE, dtype=torch.float64) for _ in range(2))
        self.total = total
        with torch.no_grad():
            for linear in (self.own, self.shared):
                linear.weight.mul_(0.3)

    def forward(self, z, x):
        mean = self.total(z.sum(0)) / NODES
        return torch.tanh(self.own(z) + self.shared(mean) + x)


def run(rank):
    fixed = {"solver": Picard(fixed_iterations=40), "adjoint": Neumann(fixed_iterations=40)}
    layer = DEQLayer(Coupled(all_reduce), batch_dim=None, **fixed)
    one = DEQLayer(Coupled(lambda t: t), batch_dim=None, tol=1e-13)
    torch.manual_seed(2)
    x = torch.randn(NODES, SIZE, dtype=torch.float64)
    x[NODES // RANKS :] *= 30  # where tanh saturates, and residuals vanish sooner
    z = layer(x.chunk(RANKS)[rank])
    exact = one(x)
    # Each step halves the error at least: 2**-40 is 1e-12.
    torch.testing.assert_close(z, exact.chunk(RANKS)[rank], rtol=1e-10, atol=1e-11)
    z.square().sum().backward()
    exact.square().sum().backward()
    for p, q in zip(layer.parameters(), one.parameters(), strict=True):
        distributed.all_reduce(p.grad)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10)
    return layer.last_solution.evaluations, layer.last_adjoint_solution.evaluations


def test_counts_and_gradients(ranks):
    first, second = ranks.run(run)
    assert first == second == (41, 40)
