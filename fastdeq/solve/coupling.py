"""Whether a map treats its samples independently, looked at once, by vector-Jacobian products.

A cotangent on some samples, and zero on the others, may reach the state of those samples alone. The
gradient of the others is then zero to the last bit, so there is no tolerance to choose: sums and
products of zeros are zeros. NaN and infinity prove nothing, as 0 times infinity is NaN.

Sets of samples, one for each product, are such that for every two samples, i and j in either order,
some set contains i and not j: a dependence of i on j shows there, whatever the graph of
dependences (a directed edge, a chain, a bipartite graph). With sets numbered 0 to k - 1, sample i
is in those of the i-th subset of k // 2 numbers. No such subset contains another, and no more
subsets have that property (E. Sperner, Math. Z. 27 (1928) 544), so k, the least with
``binomial(k, k // 2) >= B``, is as small as can be: 2 for B = 2, 6 for 20, 8 for 64, 11 for 256.

Not seen: what autograd does not see (a detached mean over the batch), and a dependence whose
derivative is zero at that state (a gate that starts at zero).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain, combinations, islice

import torch
from torch import Tensor

from ..errors import CoupledSamplesError
from ..samples import BatchDim
from ..solution import may_look

Map = Callable[[Tensor], Tensor]


def check_of(
    at: Tensor, batch_dim: BatchDim, passed: Callable[[], None]
) -> Callable[[Map], None] | None:
    """A function of a map of rows ``(B, n)`` that raises where samples are coupled at the state
    ``at``, and calls ``passed`` where it saw that they are not; None where there is nothing to
    check, or nothing that may be read."""
    if at.shape[0] < 2 or at.shape[1] == 0 or not may_look(at) or _is_recorded():
        return None

    def check(f: Map) -> None:
        leaf = at.detach().requires_grad_()
        # An evaluation of its own, whose tensors are kept as they are: the hooks of a checkpoint
        # around the layer would make it all anew for each product, and count what is saved.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            fz = f(leaf)
        if may_look(fz) and are_independent(fz, leaf, batch_dim):
            passed()

    return check


def _same(t: Tensor) -> Tensor:
    return t


def are_independent(fz: Tensor, at: Tensor, batch_dim: BatchDim) -> bool:
    """Whether no sample of ``fz`` ``(B, n)``, a function of ``at`` ``(B, n)``, depends on another.

    False where that could not be seen: there is no derivative, or not that of two samples which is
    finite and not zero (relu of zeros, in a first call with zeros).

    Raises:
        CoupledSamplesError: a sample depends on another one.
    """
    if not fz.requires_grad:
        return False
    batch = len(at)
    weights = _weights(batch, at).unsqueeze(1) * _weights(at.shape[1], at)

    def product(chosen: Tensor) -> Tensor | None:
        cotangent = torch.where(chosen.unsqueeze(1), weights, 0.0)
        return torch.autograd.grad(fz, at, cotangent, retain_graph=True, allow_unused=True)[0]

    alive, reached, sets = [], [], separating_sets(batch).to(at.device)
    for chosen in sets:
        try:
            grad = product(chosen)
        except Exception:  # no derivative: whoever asks for one is told by autograd
            return False
        if grad is None:
            return False
        found = grad.isfinite().all(1) & (grad != 0).any(1)
        alive.append(found)
        reached.append(found & ~chosen)
    wrong = torch.stack(reached)
    if not bool(wrong.any()):
        return int(torch.stack(alive).any(0).sum()) >= 2
    where, target = wrong.nonzero()[0].tolist()
    source, others = _dependence(product, sets[where], target)
    raise CoupledSamplesError(_message(source, others, batch, batch_dim))


def separating_sets(batch: int) -> Tensor:
    """``(k, batch)`` bool, sets of samples of which for every i and j one has i and not j."""
    k = 2
    while math.comb(k, k // 2) < batch:
        k += 1
    members = bytes(chain.from_iterable(islice(combinations(range(k), k // 2), batch)))
    numbers = torch.frombuffer(bytearray(members), dtype=torch.uint8).view(batch, k // 2).long()
    sets = torch.zeros(batch, k, dtype=torch.bool).scatter_(1, numbers, True).t()
    useful = sets.any(1) & ~sets.all(1)
    return sets[useful]


def _weights(count: int, like: Tensor) -> Tensor:
    """``(count,)`` irregular numbers in [1, 2), so that nothing cancels by symmetry."""
    steps = torch.arange(count, device=like.device, dtype=torch.float64)
    golden = (math.sqrt(5) - 1) / 2
    return (1 + (steps * golden) % 1).to(like.dtype)


def _dependence(
    product: Callable[[Tensor], Tensor | None], chosen: Tensor, target: int
) -> tuple[list[int], list[int]]:
    """Samples, one where bisection finds it, of those ``chosen`` ``(B,)`` that depend on the sample
    ``target``, and all others that they depend on."""

    def reached(members: list[int]) -> list[int]:
        mask = torch.zeros_like(chosen)
        mask[members] = True
        grad = product(mask)
        if grad is None:
            return []
        found = grad.isfinite().all(1) & (grad != 0).any(1) & ~mask
        return [int(i) for i in found.nonzero().flatten()]

    members = [int(i) for i in chosen.nonzero().flatten()]
    while len(members) > 1:
        middle = len(members) // 2
        for half in (members[:middle], members[middle:]):
            if target in reached(half):
                members = half
                break
        else:
            break
    return members, reached(members) or [target]


def _message(source: list[int], others: list[int], batch: int, batch_dim: BatchDim) -> str:
    def named(samples: list[int]) -> str:
        more = ", ..." if len(samples) > 4 else ""
        return f"sample{'s' * (len(samples) > 1)} {', '.join(map(str, samples[:4]))}{more}"

    return (
        f"the samples of the state are not independent: the cell's value for {named(source)} "
        f"depends on the state of {named(others)} ({batch} samples, counted by "
        f"batch_dim={batch_dim}). Each is solved by itself, so the equilibrium and its gradient "
        "would be wrong. Where all of the state is one equilibrium (the nodes of a graph, one "
        "vector, attention over the samples), pass batch_dim=None; where another dimension counts "
        "samples, as in a state (T, B, d), pass batch_dim=1. Batch normalisation belongs in eval "
        "mode, or under batch_dim=None."
    )


def _is_recorded() -> bool:
    """Whether operations go into a graph now, in which Python's decisions would be lost."""
    if torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # slow to import

    return get_proxy_mode() is not None
