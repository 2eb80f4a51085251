"""Cells that are not affine, as one writes them: f(z, x), each with its input and its start.

    narrow        tanh(W z + b + x), 64 wide: the cost of everything but the cell
    mlp           x + W2 relu(W1 z + b1) + b2
    convolution   two 3x3 convolutions with group norm, the cell of the DEQ tutorial
    transformer   attention and an MLP, each after a layer norm, x injected
    multiscale    a tuple of resolutions, each fed by all of them (as in MDEQ)
    graph         neighbours' sum, normalised by degree; one graph is one sample (1, N, d)

Scales are chosen so that plain iteration from zeros takes 9 to 21 evaluations to a relative
residual of 1e-3 at full size, in both directions: a contraction that is neither trivial nor slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = Any  # a tensor (B, ...), or a tuple of them


class Narrow(nn.Module):
    """z (B, d), x (B, d)."""

    def __init__(self, d: int, scale: float = 0.8):
        super().__init__()
        self.linear = nn.Linear(d, d)
        nn.init.normal_(self.linear.weight, std=scale / math.sqrt(d))
        nn.init.normal_(self.linear.bias, std=0.1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class MLP(nn.Module):
    """z (B, d), x (B, d). Each layer has spectral norm about 2 ``scale``: a Gaussian matrix's."""

    def __init__(self, d: int, scale: float = 0.9):
        super().__init__()
        self.inner, self.outer = nn.Linear(d, d), nn.Linear(d, d)
        for layer in (self.inner, self.outer):
            nn.init.normal_(layer.weight, std=scale / math.sqrt(d))
            nn.init.normal_(layer.bias, std=0.1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(z)))


class Convolution(nn.Module):
    """z, x (B, channels, H, W)."""

    def __init__(self, channels: int, groups: int = 8, std: float = 0.008):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.normal_(self.first.weight, std=std)
        nn.init.normal_(self.second.weight, std=std)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(3))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        first, second, third = self.norms
        y = first(torch.relu(self.first(z)))
        return third(torch.relu(z + second(x + self.second(y))))


class Transformer(nn.Module):
    """z, x (B, tokens, width). ``keep``: the weight of z itself in the residual branch."""

    def __init__(self, width: int, heads: int = 4, keep: float = 0.5, causal: bool = False):
        super().__init__()
        self.heads, self.keep, self.causal = heads, keep, causal
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        h = x + self.keep * z + self._attention(self.before_attention(z))
        return h + self.down(F.gelu(self.up(self.before_mlp(h))))

    def _attention(self, y: Tensor) -> Tensor:
        batch, tokens, width = y.shape
        parts = self.qkv(y).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.merge(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Multiscale(nn.Module):
    """z, x: tuples of (B, c_i, H / 2^i, W / 2^i)."""

    def __init__(self, channels: tuple[int, ...], groups: int = 4, gain: float = 0.9):
        super().__init__()
        self.same = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)
        self.across = nn.ModuleDict(
            {
                f"{j}to{i}": nn.Conv2d(source, target, 1, bias=False)
                for i, target in enumerate(channels)
                for j, source in enumerate(channels)
                if i != j
            }
        )
        self.norms = nn.ModuleList(nn.GroupNorm(groups, c) for c in channels)
        for layer in (*self.same, *self.across.values()):
            nn.init.kaiming_normal_(layer.weight)
            layer.weight.data *= gain / math.sqrt(len(channels))

    def initial_state(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(map(torch.zeros_like, x))

    def forward(self, z: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        out = []
        for i, part in enumerate(z):
            total = x[i] + self.same[i](part)
            for j, other in enumerate(z):
                if j != i:
                    total = total + self._resampled(self.across[f"{j}to{i}"], other, j, i)
            out.append(torch.relu(self.norms[i](total)))
        return tuple(out)

    @staticmethod
    def _resampled(mix: nn.Module, part: Tensor, source: int, target: int) -> Tensor:
        """Channels are mixed at the coarser resolution, where that is cheaper."""
        factor = 2 ** abs(source - target)
        if source < target:
            mixed: Tensor = mix(F.avg_pool2d(part, factor))
            return mixed
        return F.interpolate(mix(part), scale_factor=factor, mode="nearest")


class Graph(nn.Module):
    """z, x (1, N, d): one graph of N nodes; ``edges`` (2, E), both directions of each."""

    def __init__(self, d: int, edges: Tensor, nodes: int, scale: float = 1.1):
        super().__init__()
        self.linear = nn.Linear(d, d)
        nn.init.normal_(self.linear.weight, std=scale / math.sqrt(d))
        degree = torch.bincount(edges[1], minlength=nodes).clamp(min=1).float()
        self.register_buffer("edges", edges)
        self.register_buffer("factor", (degree[edges[0]] * degree[edges[1]]).rsqrt()[:, None])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        source, target = self.edges
        y = self.linear(z[0])
        summed = torch.zeros_like(y).index_add(0, target, self.factor * y[source])
        return torch.tanh(summed + x[0])[None]


def _random_edges(nodes: int, degree: int, generator: torch.Generator) -> Tensor:
    """Each node's ring neighbour, and random pairs up to the mean degree."""
    ring = torch.arange(nodes)
    pairs = torch.randint(nodes, (2, nodes * (degree - 2) // 2), generator=generator)
    pairs = torch.cat((torch.stack((ring, (ring + 1) % nodes)), pairs), 1)
    return torch.cat((pairs, pairs.flip(0)), 1)


@dataclass(frozen=True)
class Parts:
    """A cell with its input and the start of its solve."""

    cell: nn.Module
    x: State
    start: State


def _narrow(size: tuple[int, ...], generator: torch.Generator) -> Parts:
    d, batch = size
    return _like_x(Narrow(d), torch.randn(batch, d, generator=generator))


def _mlp(size: tuple[int, ...], generator: torch.Generator) -> Parts:
    d, batch = size
    return _like_x(MLP(d), torch.randn(batch, d, generator=generator))


def _convolution(size: tuple[int, ...], generator: torch.Generator) -> Parts:
    return _like_x(Convolution(size[1]), torch.randn(*size, generator=generator))


def _transformer(size: tuple[int, ...], generator: torch.Generator) -> Parts:
    return _like_x(Transformer(size[2]), torch.randn(*size, generator=generator))


def _multiscale(size: tuple[int, ...], generator: torch.Generator) -> Parts:
    batch, channels, side, resolutions = size
    widths = tuple(channels * 2**i for i in range(resolutions))
    x = tuple(
        torch.randn(batch, width, side >> i, side >> i, generator=generator)
        for i, width in enumerate(widths)
    )
    return Parts(Multiscale(widths), x, tuple(map(torch.zeros_like, x)))


def _graph(size: tuple[int, ...], generator: torch.Generator) -> Parts:
    nodes, d = size
    cell = Graph(d, _random_edges(nodes, 6, generator), nodes)
    return _like_x(cell, torch.randn(1, nodes, d, generator=generator))


def _like_x(cell: nn.Module, x: Tensor) -> Parts:
    return Parts(cell, x, torch.zeros_like(x))


CELLS: dict[str, Callable[[tuple[int, ...], torch.Generator], Parts]] = {
    "narrow": _narrow,
    "mlp": _mlp,
    "convolution": _convolution,
    "transformer": _transformer,
    "multiscale": _multiscale,
    "graph": _graph,
}


def build(name: str, size: tuple[int, ...], seed: int = 0) -> Parts:
    """A cell of ``CELLS``, the same in every run, in float32.

    ``size``: (d, B) of narrow and mlp; (B, channels, H, W); (B, tokens, width); (B, channels, H,
    resolutions); (nodes, d).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the weights
        return CELLS[name](size, torch.Generator().manual_seed(seed + 1))
