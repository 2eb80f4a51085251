"""Maps whose samples depend on each other, and maps whose samples do not, in float64."""

import torch

F64 = torch.float64
TIGHT = {"tol": 1e-11, "max_iter": 1000}


def contraction(n, norm=0.7):
    """``(n, n)`` dense, of 2-norm ``norm``."""
    a = torch.randn(n, n, dtype=F64)
    return norm * a / torch.linalg.matrix_norm(a, 2)


def graph(n, *edges):
    """``(n, n)``, half of a random walk along directed edges (i, j): i depends on j."""
    a = torch.zeros(n, n, dtype=F64)
    for i, j in edges:
        a[i, j] = 1
    return 0.5 * a / a.sum(1, keepdim=True).clamp(min=1)


def both_ways(*edges):
    return [*edges, *((j, i) for i, j in edges)]


def coupled_graphs():
    """Name and edges (i, j), i depends on j, of graphs of few and of many nodes."""
    ring = both_ways(*((i, (i + 1) % 23) for i in range(23)))
    far = both_ways((37, 38), (38, 39), (39, 37))
    complete = both_ways(*((i, j) for i in range(7) for j in range(7, 12)))
    blocks = both_ways(*((i, i + 1) for i in range(0, 18, 2)))
    parity = both_ways(*((i, i + 2) for i in range(14)))
    chain = [(i, i - 1) for i in range(1, 9)]
    backward = [(i - 1, i) for i in range(1, 9)]
    return {
        "ring": (23, ring),
        "isolated first nodes": (40, far),
        "bipartite": (12, complete),
        "bipartite by parity": (8, [(i, j) for i in range(0, 8, 2) for j in range(1, 8, 2)]),
        "pairs": (18, blocks),
        "within odd and within even": (16, parity),
        "chain": (9, chain),
        "chain backwards": (9, backward),
        "two nodes": (2, [(0, 1)]),
        "two nodes backwards": (2, [(1, 0)]),
        "one edge of a hundred nodes": (100, [(71, 12)]),
    }


class Counted(torch.autograd.Function):
    """The identity, which counts the products that pass it."""

    @staticmethod
    def forward(ctx, z, calls):
        ctx.calls = calls
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):
        ctx.calls.append(tuple(grad.shape))
        return grad, None
