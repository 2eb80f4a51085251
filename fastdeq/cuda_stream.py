"""The CUDA stream that work goes to: whether it is being captured, and a flag read from it late."""

from __future__ import annotations

import torch
from torch import Tensor


def is_capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is being recorded in a CUDA graph rather than run.

    Then nothing may be read from the device, and what Python decides now holds for every replay.
    """
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class DelayedFlag:
    """Tells a loop on the host whether to go on, without letting the device run dry.

    On a CUDA device the answer is the flag of the call before: its copy has long been under way
    while the host queued the work of one more iteration. On others there is nothing to wait for.
    A loop that is being recorded always goes on.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._copies: list[tuple[Tensor, torch.cuda.Event]] = []

    def goes_on(self, flag: Tensor) -> bool:
        """Takes in a scalar boolean flag; True at the first call on a CUDA device."""
        if self._device.type != "cuda" or torch.compiler.is_compiling():
            return bool(flag)
        if is_capturing(self._device):
            return True
        # Two buffers in turn: the older one has been read when it is written to again.
        if len(self._copies) == 2:
            host = self._copies.pop(0)[0]
        else:
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        self._copies.append((host, copied))
        if len(self._copies) < 2:
            return True
        before, arrived = self._copies[0]
        arrived.synchronize()
        return bool(before)
