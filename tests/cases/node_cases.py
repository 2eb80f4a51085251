"""Which of the two nodes an affine layer puts into the graph."""

import pytest
import torch

import fastdeq.layer as layer_module
from fastdeq.backends import extension

NODES = ["compiled", "python"]


def use_node(monkeypatch, name):
    """Has affine layers use the node ``name``."""
    if name == "python":
        monkeypatch.setattr(layer_module, "plan_for", lambda *_: None)
    elif extension.module is None:
        pytest.skip("no extension here")


def is_compiled(z):
    """Whether z came from the compiled node."""
    assert z.grad_fn.name() == "AffineFixedPointBackward"
    return not isinstance(z.grad_fn, torch.autograd.function.BackwardCFunction)
