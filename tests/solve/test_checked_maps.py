"""Which maps were seen to be independent: what makes two the same, and what is kept of them."""

import functools
import gc
import threading
import weakref

import pytest
import torch
from coupled_cases import F64, Counted, contraction, graph
from torch import nn

from fastdeq import CoupledSamplesError, DEQLayer, fixed_point
from fastdeq.solve import checked_maps, coupling


def solve(f, z0, **options):
    return fixed_point(f, z0, **{"on_failure": "ignore", **options})


def test_a_function_is_checked_once_for_each_code_and_number_of_dimensions():
    w, products = contraction(4), []

    def call(*shape, z0=None, **options):
        """How many products pass, before a gradient is asked for."""
        products.clear()
        c = torch.randn(shape, dtype=F64, requires_grad=True)  # a new function over a new tensor
        f = lambda z: Counted.apply(z @ w, products) + c  # noqa: E731
        solve(f, torch.zeros(shape, dtype=F64), **options)
        return len(products)

    assert call(1, 4) == 0  # nothing to look at
    assert call(5, 4) == len(coupling.separating_sets(5))
    assert [call(n, 4) for n in (5, 3, 1, 80)] == [0, 0, 0, 0]
    assert call(5, 2, 4) > 0
    assert call(5, 2, 4) == 0
    assert call(5, 2, 4, batch_dim=1) > 0
    assert call(5, 2, 4, batch_dim=1) == 0
    assert call(5, 2, 4, batch_dim=None) == 0


def norm_solve(norm, z0, **options):
    """One code for every module."""
    return solve(lambda z: 0.3 * norm(z) + 1, z0, **options)


def test_modules_in_the_function_are_told_apart_and_so_are_their_modes():
    z0 = torch.randn(6, 4)
    norm = nn.BatchNorm1d(4).eval()
    norm_solve(nn.LayerNorm(4), z0)
    norm_solve(norm, z0)
    for frozen in (norm, nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), norm)):
        with pytest.raises(CoupledSamplesError):
            norm_solve(frozen.train(), z0)
        norm_solve(frozen.eval(), z0)
        norm_solve(frozen.train(), z0, batch_dim=None)


NORM = nn.BatchNorm1d(4).eval()


class Holder:
    def __init__(self, norm):
        self.norm = norm

    def __call__(self, z):
        return 0.3 * self.norm(z) + 1

    def method(self, z):
        return self(z)


def scripted(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.tanh(z) + 1


def halved(function, z):
    return function(z) / 2


def test_modules_are_found_where_functions_keep_them():
    z0, norm = torch.randn(6, 4), nn.BatchNorm1d(4).eval()
    holder, inner = Holder(norm), lambda z: norm(z)
    ways = [
        (NORM, lambda z: 0.3 * NORM(z) + 1),
        (norm, lambda z: 0.3 * inner(z) + 1),
        (norm, functools.partial(halved, inner)),
        (norm, holder),
        (norm, holder.method),
        (norm, lambda z: holder(z)),
        (norm, norm),
    ]
    for module, f in ways:
        solve(f, z0)
        module.train()
        with pytest.raises(CoupledSamplesError):
            solve(f, z0)
        module.eval()


class OverBatch(Holder):
    def __call__(self, z):
        return 0.3 * self.norm(z - z.mean(0)) + 1


def test_objects_that_share_a_module_are_told_apart():
    z0, norm = torch.randn(6, 4), nn.LayerNorm(4)
    layer = DEQLayer(lambda z, x: z, on_failure="ignore")
    for kind in (Holder, OverBatch):
        held = kind(norm)
        run = lambda f: solve(lambda z: f(z), z0)  # noqa: E731
        layer.cell = functools.partial(call_without_input, held)
        if kind is Holder:
            run(held)
            layer(z0)
            continue
        with pytest.raises(CoupledSamplesError):
            run(held)
        with pytest.raises(CoupledSamplesError):
            layer(z0)


def call_without_input(f, z, x):
    return f(z)


def test_nothing_is_kept_alive():
    def make():
        net = nn.Linear(3, 3)
        code = compile("def f(z): return 0.1 * net(z) + 1", "somewhere", "exec")
        space = {"net": net}
        exec(code, space)
        return space["f"], net

    before = len(checked_maps._by_code)
    f, net = make()
    solve(f, torch.zeros(4, 3))
    assert len(checked_maps._by_code) == before + 1
    alive = weakref.ref(net)
    del f, net
    gc.collect()
    assert alive() is None
    assert len(checked_maps._by_code) == before


def test_functions_of_every_kind():
    """Built-in ones, objects that compare by value, and that cannot be referenced weakly."""

    class Slots:
        __slots__ = ("calls",)

        def __init__(self):
            self.calls = []

        def __call__(self, z):
            return 0.5 * Counted.apply(z, self.calls) + 1

    class ByValue:
        __hash__ = None

        def __eq__(self, other):
            raise AssertionError

        def __call__(self, z):
            return 0.5 * z + 1

    z0 = torch.zeros(4, 3)
    slots, value = Slots(), ByValue()
    for f in (torch.cos, nn.functional.relu, value, value, functools.partial(torch.mul, 0.5)):
        solve(f, z0)
        solve(f, z0)
    for _ in range(2):  # not known again, so looked at again
        slots.calls.clear()
        solve(slots, z0)
        assert slots.calls
    with pytest.raises(CoupledSamplesError):
        solve(lambda z: torch.cumsum(z, 0) / 9 + 1, z0)


def test_proxies_that_stand_for_nothing():
    class Proxy:
        def __getattribute__(self, name):
            raise RuntimeError("outside of its context")

    proxy = Proxy()
    solve(lambda z: 0.5 * z + 1 if proxy is not None else z, torch.zeros(4, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_functions_and_modules():
    norm = torch.jit.script(nn.BatchNorm1d(4))
    for _ in range(2):
        solve(torch.jit.script(scripted), torch.zeros(5, 4))
    norm.eval()
    norm_solve(norm, torch.randn(6, 4))
    with pytest.raises(CoupledSamplesError):
        norm_solve(norm.train(), torch.randn(6, 4))


def test_more_maps_than_are_remembered():
    for _ in range(checked_maps._MOST + 5):
        norm_solve(nn.LayerNorm(4), torch.zeros(3, 4), max_iter=3)
    memory = checked_maps.with_the_code_of(lambda z: z)
    assert len(memory._keys) <= checked_maps._MOST
    assert max(len(m._keys) for m in checked_maps._by_code.values()) <= checked_maps._MOST


def test_threads():
    w, errors = contraction(4), []
    a = graph(9, (2, 5))

    c = torch.ones(9, 4, dtype=F64, requires_grad=True)

    def work(coupled):
        try:
            for _ in range(5):
                f = (lambda z: a @ z + c) if coupled else (lambda z: z @ w + c)
                solve(f, torch.zeros(9, 4, dtype=F64))[0].sum().backward()
                assert not coupled
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n % 2 == 0,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(e) for e in errors] == [CoupledSamplesError] * 2
