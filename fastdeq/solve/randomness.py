"""The same random numbers in every evaluation of one solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Replay:
    """Calls functions, each with the random numbers of the first call.

    Those of PyTorch's default generators: of the CPU, and of the CUDA devices of the tensors in
    ``arguments``. After the first call these have moved on by what that drew, and no other call
    moves them, so the next solve draws other numbers however many evaluations this one takes.
    ``torch.utils.checkpoint`` does the same around a recomputation. A generator is there once for
    all threads: two may not draw at the same time.
    """

    def __init__(self, arguments: Any):
        tensors = (t for t in tree_leaves(arguments) if isinstance(t, Tensor))
        found = {t.device.index for t in tensors if t.device.type == "cuda"}
        self._devices = sorted(i for i in found if i is not None)
        self._first: list[Tensor] | None = None

    def __call__(self, f: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        now = self._states()
        if self._first is None:
            self._first = now
            return f(*args, **keywords)
        self._restore(self._first)
        try:
            return f(*args, **keywords)
        finally:
            self._restore(now)

    def _states(self) -> list[Tensor]:
        on_gpu = [torch.cuda.get_rng_state(device) for device in self._devices]
        return [torch.default_generator.get_state(), *on_gpu]

    def _restore(self, states: list[Tensor]) -> None:
        torch.default_generator.set_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
