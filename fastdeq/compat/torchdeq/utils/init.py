"""Starts of a solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mixed_init(z_shape: Sequence[int], device: Any = None) -> Tensor:
    """Normal numbers of which a random half are zero, shape ``z_shape``: a start that makes the
    equilibrium depend less on where a solve begins.

    Source: Anil et al., "Path Independent Equilibrium Models Can Better Exploit Test-Time
    Computation", 2022, arXiv 2211.09961.
    """
    start = torch.randn(*z_shape, device=device)
    return start * torch.zeros_like(start).bernoulli_(0.5)
