"""Capability, multiprocessors and shared memory of a CUDA device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch


class Gpu(NamedTuple):
    """What the choice depends on of a device."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes that a block can have


#: By capability, for devices that are not at hand: A100, H100. Source: CUDA C++ Programming Guide.
KNOWN_GPUS = {(8, 0): Gpu((8, 0), 108, 163 * 1024), (9, 0): Gpu((9, 0), 132, 227 * 1024)}


def gpu_from(properties: Any) -> Gpu:
    """What the driver says of a device, from ``torch.cuda.get_device_properties``.

    A block can have more shared memory than it gets without asking; where that limit is not among
    the properties, as with HIP, the smaller one counts.
    """
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    return Gpu(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        shared or properties.shared_memory_per_block,
    )


@functools.cache
def _gpu(index: int) -> Gpu:
    return gpu_from(torch.cuda.get_device_properties(index))


def gpu_of(device: torch.device) -> Gpu | None:
    """What ``device`` is, None where it is no GPU."""
    if device.type != "cuda":
        return None
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)
