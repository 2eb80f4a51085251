"""Ceilings of a GPU, measured on the spot, and the time that no solve can fall below.

    d, B    size of the state, samples        s    bytes of a number, 4
    p       products with W summed over the samples: each sample's own count of updates, since the
            first evaluation, W 0, needs none and the last one verifies
    q       the same of the adjoint

*Forward solve.* Operations: ``2 d^2`` per sample and product, so ``2 d^2 p``. The activation, the
residual's norm and the rest are of order ``d p`` and left out. Bytes through device memory: W and c
are read and z written once, and of each sample a status (1), a count (4) and a residual (4):
``s (d^2 + 2 d B) + 9 B``; with the slope, which a backward pass needs, ``s d B`` more. W and the
state stay on the chip in between, in the best case.

*Forward and backward.* The two solves, the injection ``x U^T`` and the products for dU, dW and dx:
``2 d^2 (p + q + 4 B)`` operations. Bytes: W, U, x, b and g are read, z, dW, dU, dx and db written,
each once: ``s (4 d^2 + 4 d B + 2 d) + 18 B``.

The floor is the larger of operations over rate and bytes over bandwidth, for the rate of float32
products and for that of bfloat16 ones. A solve with both kinds of products lies between the two;
one that ends with a verified float32 residual cannot be all bfloat16. Not in it are launches, waits
of one block for another, and the order of the iterations: a product for few samples does not fill
the chip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpu_clock import Clock

_FLOAT = 4


class Ceilings(NamedTuple):
    """Bytes read and written, and operations, per second."""

    bandwidth: float
    float32: float
    bfloat16: float


class Floor(NamedTuple):
    """Milliseconds."""

    float32: float
    bfloat16: float


def measured(clock: Clock, small: bool = False) -> Ceilings:
    """A copy from device memory to device memory, and products of large random matrices.

    Random ones: on zeros the same product is faster.
    """
    numbers, size = (1 << 16, 64) if small else (1 << 28, 8192)
    copy = clock.median(_copy(torch.randn(numbers, device=clock.device)), 20)
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
        rates.append(2 * size**3 / clock.median(_product(a, b), 10))
    return Ceilings(2 * _FLOAT * numbers / copy, *rates)


def _copy(source: torch.Tensor) -> Callable[[], Any]:
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], Any]:
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def forward_floor(d: int, batch: int, products: float, slope: bool, to: Ceilings) -> Floor:
    """Of the forward solve alone; ``products`` is p."""
    moved = _FLOAT * (d * d + (3 if slope else 2) * d * batch) + 9 * batch
    return _floor(2.0 * d * d * products, moved, to)


def training_floor(d: int, batch: int, products: float, to: Ceilings) -> Floor:
    """Of a forward and backward pass; ``products`` is p + q."""
    moved = _FLOAT * (4 * d * d + 4 * d * batch + 2 * d) + 18 * batch
    return _floor(2.0 * d * d * (products + 4 * batch), moved, to)


def _floor(operations: float, moved: float, to: Ceilings) -> Floor:
    return Floor(*(1e3 * max(operations / rate, moved / to.bandwidth) for rate in to[1:]))
