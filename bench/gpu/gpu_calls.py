"""What a piece of code asks of the CUDA runtime, counted by PyTorch's profiler.

Calls are counted inside named ranges, whichever thread makes them: autograd's threads work while
the range is open. The profiler synchronises too when it starts and stops, outside of the ranges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

# Calls after which the host has waited for the device. A copy from the device that PyTorch waits
# for is a cudaMemcpyAsync and a cudaStreamSynchronize: one wait.
WAITS = frozenset(
    {
        *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
        *("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"),
        *("cudaMemcpy", "cudaMemcpy2D", "cuMemcpyDtoH", "cuMemcpyHtoD"),
    }
)
LAUNCHES = frozenset(
    {
        *("cudaLaunchKernel", "cudaLaunchKernelExC", "cudaLaunchCooperativeKernel"),
        *("cuLaunchKernel", "cuLaunchKernelEx", "cuLaunchCooperativeKernel"),
        *("cudaGraphLaunch", "cuGraphLaunch"),
    }
)
# What the caching allocator had to ask the driver for; cudaFree waits for the device.
ALLOCATIONS = frozenset(
    {"cudaMalloc", "cudaMallocAsync", "cudaFree", "cudaHostAlloc", "cudaFreeHost"}
)
_VERSION = re.compile(r"(_ptsz|_ptds|_v\d+)+$")


class HostCall(NamedTuple):
    """Something that a thread of the host did, in nanoseconds."""

    name: str
    start: int
    end: int


class Calls(NamedTuple):
    """Numbers of calls in a range."""

    waits: int
    launches: int
    allocations: int


def names_in(calls: Iterable[HostCall], label: str) -> list[str]:
    """What happened inside the range ``label``, without the version in the name of a call.

    Raises:
        ValueError: the range was not recorded.
    """
    calls = list(calls)
    span = next((call for call in calls if call.name == label), None)
    if span is None:
        raise ValueError(f"the profiler did not record the range {label!r}")
    inside = [c for c in calls if span.start <= c.start and c.end <= span.end]
    return [_VERSION.sub("", call.name) for call in inside]


def calls_in(calls: Iterable[HostCall], label: str) -> Calls:
    """Counts the calls inside the range ``label``."""
    names = names_in(calls, label)
    return Calls(*(sum(n in kind for n in names) for kind in (WAITS, LAUNCHES, ALLOCATIONS)))


def host_calls(recorded: profile) -> list[HostCall]:
    """What the host did.

    Taken from below ``recorded.events()``, which builds a tree of all operators first and takes
    seconds for a solve that iterates in Python.
    """
    results: Any = recorded.profiler.kineto_results
    return [
        HostCall(e.name(), e.start_ns(), e.start_ns() + e.duration_ns())
        for e in results.events()
        if e.device_type() == torch.autograd.DeviceType.CPU
    ]


def profiled(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    announce: Callable[[str], None] = lambda name: None,
) -> dict[str, Calls]:
    """Runs each once under one profiler and counts its calls; they should be warm."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

    def settle() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    with profile(activities=activities) as recorded:
        for name, run in runs.items():
            announce(name)
            settle()
            with record_function(_label(name)):
                run()
            settle()
    calls = host_calls(recorded)
    return {name: calls_in(calls, _label(name)) for name in runs}


def _label(name: str) -> str:
    return f"counted: {name}"
