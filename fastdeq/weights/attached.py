"""Whether something was attached to a module that may change what it returns."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_modified(module: nn.Module) -> bool:
    """Whether ``module`` or one of its parts has hooks, or a method patched on the object itself.

    Hooks come and go, so this is asked at every call, and asks dictionaries only.
    """
    return bool(_has_any_global_hook()) or _has_own(module)


def _has_own(module: nn.Module) -> bool:
    own = module.__dict__
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in own
        or "compose" in own
        or "orthogonal" in own
        or "current_scale" in own
    ):
        return True
    for part in module._modules.values():  # noqa: SIM110, a generator takes twice the time
        if part is not None and _has_own(part):
            return True
    return False
