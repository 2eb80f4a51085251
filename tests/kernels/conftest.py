"""Tests of the GPU kernels: on a GPU where there is one, or under Triton's interpreter on the CPU.

Triton decides when it is imported whether it interprets, so the interpreter has a run of its own:
``TRITON_INTERPRET=1 pytest tests/kernels``, as ``make test`` does. Without it and without a GPU
nothing here is collected.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def _patch_once():
    """At every call of a device function the interpreter looks through the whole language for what
    it has to replace, though the launch has replaced it: half of the time of these tests."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    nothing_to_restore = getattr(interpreter, "_LangPatchScope", lambda: None)

    def patch_where_needed(fn):
        languages = [m for m in fn.__globals__.values() if m is tl or m is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(fn)
        return nothing_to_restore()

    interpreter._patch_lang = patch_where_needed


if INTERPRETED:
    _patch_once()


@pytest.fixture(scope="session")
def device():
    """Where the tensors live: "cpu" under the interpreter, else "cuda"."""
    return "cpu" if INTERPRETED else "cuda"
