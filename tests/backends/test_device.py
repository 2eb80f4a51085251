"""What is known of a CUDA device comes from the driver: stand-ins for its properties, no GPU."""

from types import SimpleNamespace

import pytest
import torch

from fastdeq.backends import device
from fastdeq.backends.device import Gpu, gpu_from, gpu_of


def properties(major, minor, shared, **more):
    return SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=77,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=shared,
        **more,
    )


# A GB10, a capability that no table here ever had, and an H100 with less than the guide says.
@pytest.mark.parametrize(
    ("capability", "shared"), [((12, 1), 101376), ((13, 2), 300000), ((9, 0), 200 * 1024)]
)
def test_shared_memory_is_what_the_driver_says(monkeypatch, capability, shared):
    device._gpu.cache_clear()
    found = properties(*capability, shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("cuda", "cuda:0", "cuda:3"):
        assert gpu_of(torch.device(name)) == Gpu(capability, 77, shared)
    device._gpu.cache_clear()


def test_without_the_larger_limit_the_smaller_one_counts():
    found = properties(9, 4, 0)
    assert gpu_from(found).shared_memory == 48 * 1024
    del found.shared_memory_per_block_optin
    assert gpu_from(found).shared_memory == 48 * 1024


def test_a_cpu_is_no_gpu():
    assert gpu_of(torch.device("cpu")) is None
