"""The CUDA stream that work goes to: whether it is captured, and a number read from it late."""

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


class DelayedCount:
    """Tells a loop on the host how much is left to do, without letting the device run dry.

    On a CUDA device the answer is the count of the call before: its copy has long been under way
    while the host queued the work of one more iteration. On others there is nothing to wait for.
    While the loop is being recorded, and at the first call on a CUDA device, it is ``most``.
    """

    def __init__(self, device: torch.device, most: int):
        self._device, self._most = device, most
        self._copies: list[tuple[Tensor, torch.cuda.Event]] = []

    def left(self, running: Tensor) -> int:
        """Takes in which samples go on ``(B,)`` bool; how many there were, as above."""
        if torch.compiler.is_exporting():
            return 1  # the program has all iterations; in those too many all samples are frozen
        if torch.compiler.is_compiling():
            return bool(running.any())
        count = running.sum()
        if self._device.type != "cuda":
            return int(count)
        if is_capturing(self._device):
            return self._most
        # Two buffers in turn: the older one has been read when it is written to again.
        if len(self._copies) == 2:
            host = self._copies.pop(0)[0]
        else:
            host = torch.empty((), dtype=torch.int64, pin_memory=True)
        host.copy_(count, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        self._copies.append((host, copied))
        if len(self._copies) < 2:
            return self._most
        before, arrived = self._copies[0]
        arrived.synchronize()
        return int(before)
