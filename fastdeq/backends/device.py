"""Capability, multiprocessors and shared memory of a CUDA device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """What the choice depends on of a device."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes that a block can have


#: By capability, for devices that are not at hand: A100, H100.
KNOWN_GPUS = {(8, 0): Gpu((8, 0), 108, 163 * 1024), (9, 0): Gpu((9, 0), 132, 227 * 1024)}

# Shared memory that a block can have, in KiB; where a capability is missing, the least of any.
# Source: CUDA C++ Programming Guide, technical specifications per compute capability.
_SHARED_MEMORY = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
_LEAST_SHARED_MEMORY = 99


@functools.cache
def _gpu(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    capability = (found.major, found.minor)
    shared = _SHARED_MEMORY.get(capability, _LEAST_SHARED_MEMORY) * 1024
    return Gpu(capability, found.multi_processor_count, shared)


def gpu_of(device: torch.device) -> Gpu | None:
    """What ``device`` is, None where it is no GPU."""
    if device.type != "cuda":
        return None
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)
