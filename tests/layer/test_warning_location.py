"""A warning about a solve points at the line of the user's code that asked for it."""

import _thread
import inspect
import threading
import time
import warnings

import pytest
import torch
from layer_cases import Residual, affine

from fastdeq import DEQLayer, failure, fixed_point
from fastdeq.failure import handle_failure


@pytest.fixture(params=["fused", "general"])
def failing(request):
    """Builds a layer of which every solve fails."""

    def make(kind=DEQLayer, **options):
        cell = affine(6, 6, scale=3.0) if request.param == "fused" else Residual(6)
        options = {"max_iter": 2, "adjoint_max_iter": 1, "tol": 1e-12, **options}
        return kind(cell, **options)

    return make


@pytest.fixture
def places():
    """(file, line) of every warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [(w.filename, w.lineno) for w in caught]


def here(offset=0):
    return (__file__, inspect.currentframe().f_back.f_lineno + offset)


def test_layer_and_backward(failing, places):
    layer = failing()
    z = layer(torch.randn(3, 6))
    z.sum().backward()
    assert places() == [here(-2), here(-1)]


def test_grad_instead_of_backward(failing, places):
    x = torch.randn(3, 6, requires_grad=True)
    z = failing()(x)
    torch.autograd.grad(z.sum(), x)
    assert places() == [here(-2), here(-1)]


def test_second_derivative(failing, places):
    layer = failing(max_iter=60, tol=1e-3, adjoint_tol=1e-12)
    x = torch.randn(3, 6, requires_grad=True)
    z = layer(x)
    before = len(places())
    (g,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    assert places()[before:] == [here(-1)]
    g.sum().backward()


def test_within_modules_of_torch(failing, places):
    layer = failing()
    net = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Identity(), layer), torch.nn.ReLU())
    net(torch.randn(3, 6))
    assert places() == [here(-1)]


def test_checkpointed(failing, places):
    layer = failing()
    x = torch.randn(3, 6, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert places() == [here(-1)]


class Model(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    @torch.no_grad()
    def forward(self, x):
        return self.layer(x)


class Squashed(DEQLayer):
    def forward(self, x, **more):
        return super().forward(torch.tanh(x), **more)


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    return (__file__, first + next(i for i, line in enumerate(lines) if text in line))


def test_a_module_of_the_user(failing, places):
    Model(torch.nn.Sequential(failing()))(torch.randn(3, 6))
    assert places() == [line_of(Model, "self.layer(x)")]


def test_a_subclass_that_overrides_forward(failing, places):
    torch.nn.Sequential(failing(Squashed))(torch.randn(3, 6))
    assert places() == [line_of(Squashed, "super().forward(torch")]


def test_a_cell_of_the_user_that_contains_a_layer(failing, places):
    inner = failing()
    outer = DEQLayer(lambda z, x: 0.1 * inner(z) + x, on_failure="ignore")
    outer(torch.randn(3, 6))
    # The second is about the inner adjoint, in the products that show samples to be independent.
    assert places() == [here(-3), here(-2)]


def test_traced_by_fx(failing, places):
    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, DEQLayer) or super().is_leaf_module(module, name)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = failing()

        def forward(self, x):
            return 2 * self.layer(x)

    net = Net()
    traced = torch.fx.GraphModule(net, Leaves().trace(net))
    traced(torch.randn(3, 6))
    assert places() == [here(-1)]


@pytest.mark.parametrize("batch", [1, 4])
def test_fixed_point(batch, places):
    theta = torch.full((batch, 2), 0.5, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(batch, 2, dtype=torch.float64)
    limits = {"max_iter": 2, "adjoint_max_iter": 1}
    z, _ = fixed_point(lambda z: torch.cos(z + theta), start, tol=1e-14, **limits)
    call = here(-1)
    z.prod().backward()
    first, second = places()
    assert first == call
    assert second == here(-3)


def test_from_a_thread_of_the_user(failing, places):
    layer, x = failing(), torch.randn(3, 6)

    def work():
        layer(x).sum().backward()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert places() == [line_of(work, "layer(x)")] * 2


class InAnotherThread(torch.autograd.Function):
    """Its backward calls a function of fastdeq in a thread that has no other frame of Python, as
    autograd runs the nodes of a CUDA device, and waits until a warning was seen."""

    @staticmethod
    def forward(ctx, x, failed, places):
        ctx.failed, ctx.places = failed, places
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        _thread.start_new_thread(handle_failure, (ctx.failed, "warn", "adjoint solve"))
        end = time.monotonic() + 60
        while not ctx.places() and time.monotonic() < end:
            time.sleep(0.001)
        return grad, None, None


def test_from_a_thread_of_autograd(places):
    _, failed = fixed_point(torch.cos, torch.ones(2, 2), max_iter=1, on_failure="ignore")
    y = InAnotherThread.apply(torch.ones(3, requires_grad=True), failed, places)
    y.sum().backward()
    assert places() == [here(-1)]


def test_from_a_thread_that_nothing_is_known_of(places):
    _, failed = fixed_point(torch.cos, torch.ones(2, 2), max_iter=1, on_failure="ignore")
    _thread.start_new_thread(handle_failure, (failed, "warn", "adjoint solve"))
    end = time.monotonic() + 60
    while not places() and time.monotonic() < end:
        time.sleep(0.001)
    ((file, _),) = places()
    assert file == failure.__file__
