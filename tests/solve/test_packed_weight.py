"""Memory of solves with symmetric weights: what is made per call, what is kept, and that what is
kept is that of the weight."""

import copy
import pickle
import threading

import pytest
import torch

from fastdeq import AffineCell, DEQLayer
from fastdeq.backends import extension
from fastdeq.ops.pack_weight import reads_triangle
from fastdeq.options import Options
from fastdeq.solve.packed import PackedWeight
from fastdeq.solve.spec import Specs
from fastdeq.solvers import Structure
from fastdeq.weights import Symmetric

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def layer_of(size, dtype=torch.float32, bound=None, **options):
    weight = Symmetric(size, 0.6, max_eigenvalue=bound, dtype=dtype)
    cell = AffineCell(5, size, weight=weight, dtype=dtype)
    return DEQLayer(cell, on_failure="ignore", **options)


def allocations(call, least):
    """Of at least so many bytes, in C++ and in Python, while ``call`` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    found = [e.nbytes() for e in events if e.name() == "[memory]"]
    assert any(size > 0 for size in found), "nothing was seen"
    return [size for size in found if size >= least]


def test_allocations_are_seen():
    packing = torch.ops.fastdeq.pack_weight
    assert allocations(lambda: packing(torch.ones(300, 300), "auto"), 8 * 300 * 300)


@dtypes
@pytest.mark.parametrize("bound", [None, 0.3], ids="bound {}".format)
@pytest.mark.parametrize("batch", [1, 8])
def test_a_solve_without_a_gradient_makes_nothing_of_the_size_of_w(batch, bound, dtype):
    size = 600
    layer, x = layer_of(size, dtype, bound), torch.randn(batch, 5, dtype=dtype)
    with torch.no_grad():
        for _ in range(2):  # the second call copies A, to compare it with
            layer(x)
        assert allocations(lambda: layer(x), size * size * dtype.itemsize // 2) == []
    with torch.inference_mode():
        assert allocations(lambda: layer(x), size * size * dtype.itemsize // 2) == []


@dtypes
@pytest.mark.parametrize("batch", [1, 8])
def test_a_training_step_makes_a_gradient_of_w_and_of_a(batch, dtype):
    size = 600
    layer, x = layer_of(size, dtype), torch.randn(batch, 5, dtype=dtype)

    def step():
        layer.zero_grad()
        layer(x).square().sum().backward()

    for _ in range(2):
        step()
    of_w = size * size * dtype.itemsize
    found = allocations(step, of_w // 2)
    assert len(found) <= 2  # dL/dW, dL/dA
    assert sum(found) <= 2 * of_w


def large(tensors, size):
    return {
        t.untyped_storage().data_ptr()
        for t in tensors
        if t is not None and t.numel() * t.element_size() >= size * size * 4
    }


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("size", [400, 520])
def test_graphs_share_the_weight_and_its_packed_form(size, batch):
    layer = layer_of(size)
    first, second = layer(torch.randn(batch, 5)), layer(torch.randn(batch, 5))
    kept = large(first.grad_fn.saved_tensors, size)
    assert kept == large(second.grad_fn.saved_tensors, size)
    assert len(kept) == (1 if size >= 512 and batch <= 2 else 2)
    with torch.no_grad():
        layer.cell.weight.weight.mul_(0.5)
    third = layer(torch.randn(batch, 5))
    assert not kept & large(third.grad_fn.saved_tensors, size)
    loss = first.sum() + second.sum() + third.sum()
    loss.backward()


@dtypes
@pytest.mark.parametrize("gradient", [True, False])
def test_no_change_of_the_weight_is_missed(gradient, dtype):
    layer, x = layer_of(70, dtype, tol=1e-6), torch.randn(6, 5, dtype=dtype)
    changes = (
        lambda a: a.mul_(0.9),
        lambda a: a.data.mul_(0.9),
        lambda a: a.detach().numpy().__imul__(0.9),
        lambda a: a.copy_(torch.randn_like(a) * 0.05),
        lambda a: setattr(layer.cell.weight, "weight", torch.nn.Parameter(0.5 * a)),
        lambda a: layer.cell.recurrent_weight().mul_(2.0),  # nobody's business but the caller's
    )
    for change in changes:
        with torch.no_grad():
            change(layer.cell.weight.weight)
        fresh = copy.deepcopy(layer)
        with torch.set_grad_enabled(gradient):
            found, right = layer(x), fresh(x)
        assert torch.equal(found, right)
        if gradient:
            found.square().sum().backward()
            right.square().sum().backward()
            pairs = zip(layer.parameters(), fresh.parameters(), strict=True)
            assert all(torch.equal(p.grad, q.grad) for p, q in pairs)
            layer.zero_grad()


def test_what_is_kept_is_told_apart():
    kept = PackedWeight()
    w = torch.randn(80, 80)
    w = w + w.t()
    first = kept.of(w, "float32")
    assert kept.of(w, "float32") is first
    assert kept.of(w.detach(), "float32") is first
    assert kept.of(w, "auto") is not first or not extension.has_low_precision
    other = kept.of(w.clone(), "float32")
    assert other is not first
    w[2, 3] = 7
    changed = kept.of(w, "float32")
    fresh = torch.ops.fastdeq.pack_weight(w, "float32")
    written = slice(64, 64 + 80 * 80 * 4)  # behind the header
    assert torch.equal(changed[written], fresh[written])
    with torch.inference_mode():
        assert not kept.of(w.detach(), "float32").is_inference()
        assert kept.of(torch.ones(3, 3), "float32") is None
    assert copy.deepcopy(kept)._entry is None
    assert len(pickle.dumps(kept)) < 200
    assert torch.func.vmap(lambda t: t * (kept.of(w, "float32") is None))(torch.ones(2)).all()


@pytest.mark.parametrize(
    ("batch", "size", "precision", "reads"),
    [
        (1, 512, "auto", True),
        (2, 900, "float32", True),
        (3, 512, "auto", False),
        (1, 511, "auto", False),
        (1, 512, "mixed", False),
    ],
)
def test_what_is_read_where_it_lies_is_not_packed(batch, size, precision, reads):
    assert reads_triangle(batch, size, precision) == reads
    if precision == "mixed" and not extension.has_low_precision:
        return
    structure = Structure(None, frozenset({"symmetric", "monotone"}), True, True)
    specs = Specs(Options(precision=precision), structure)
    packed = specs.packed_weight(torch.eye(size), torch.ones(batch, size), None)
    assert (packed is None) == reads


def test_other_engines_dtypes_and_weights_are_not_packed_for():
    w, c = torch.eye(9), torch.ones(3, 9)
    symmetric = Structure(None, frozenset({"symmetric", "monotone"}), True, True)
    assert Specs(Options(), symmetric).packed_weight(w, c, None) is not None
    assert Specs(Options(), symmetric).packed_weight(w, c.double(), None) is None
    assert Specs(Options(backend="reference"), symmetric).packed_weight(w, c, None) is None
    assert Specs(Options(), Structure(affine=True)).packed_weight(w, c, None) is None


@pytest.mark.parametrize(("batch", "size"), [(1, 520), (3, 520), (1, 60), (5, 60)])
def test_compiled_layers_pack_within_the_graph(fresh_compiler, batch, size):
    layer, x = layer_of(size, torch.float64, tol=1e-9), torch.randn(batch, 5, dtype=torch.float64)
    graphs = []

    def backend(graph, inputs):
        graphs.append(
            [
                str(n.target)
                for n in graph.graph.find_nodes(
                    op="call_function", target=torch.ops.fastdeq.pack_weight.default
                )
            ]
        )
        return graph

    from torch._dynamo.backends.common import aot_autograd

    compiler = aot_autograd(fw_compiler=backend, bw_compiler=backend)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    z = compiled(x)
    z.square().sum().backward()
    gradient = layer.cell.weight.weight.grad.clone()
    layer.zero_grad()
    right = layer(x)
    right.square().sum().backward()
    torch.testing.assert_close(z, right, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gradient, layer.cell.weight.weight.grad, rtol=1e-7, atol=1e-7)
    assert sum(map(len, graphs)) == (0 if reads_triangle(batch, size, "auto") else 1)


def test_an_exported_layer_takes_any_batch():
    layer, size = layer_of(520, torch.float64).requires_grad_(False), 520
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        layer, (torch.randn(4, 5).double(),), dynamic_shapes=({0: batch}, None)[:1]
    )
    for count in (1, 2, 3, 9):
        x = torch.randn(count, 5).double()
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-4)
    assert size == layer.cell.features


def test_threads_may_share_a_layer():
    layer, wrong = layer_of(64, tol=1e-6), []
    inputs = [torch.randn(4, 5) for _ in range(4)]
    right = [layer(x).detach() for x in inputs]

    def work(x, expected):
        for _ in range(20):
            if not torch.equal(layer(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, right, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
