"""``DEQLayer`` end to end on a GPU, with each backend, against float64 on the CPU."""

from __future__ import annotations

import os

import pytest
import torch
from exact import TOL, Exact, make_cell
from gpu_calls import profiled
from torch import nn

from fastdeq import AffineCell, BackendError, ConvergenceError, DEQLayer, Energy, Status

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="about layers on a device; the interpreter runs kernels on the CPU",
    ),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"
BACKENDS = ("auto", "reference", "triton", "cuda")
# Around the edges of tiles of 16, 32, 64 and 128, and of a warp.
SHAPES = ((1, 1), (15, 3), (16, 16), (17, 5), (31, 33), (64, 64), (65, 63), (127, 2), (128, 129))
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


def run(layer, x, g):
    """z and the gradients of <g, z> in x and W; skips a backend that is not there."""
    x = x.detach().requires_grad_()
    try:
        z = layer(x)
        return z, *torch.autograd.grad(z, (x, layer.cell.weight.weight), g.to(z.dtype))
    except BackendError as reason:
        pytest.skip(str(reason))


def problem(shape, dtype=torch.float32, device=DEVICE, **options):
    """A cell on the device, with an input and a gradient of its state."""
    d, batch = shape
    cell = make_cell(d, dtype=dtype).to(device)
    x, g = (torch.randn(batch, d).to(device, dtype) for _ in range(2))
    return DEQLayer(cell, tol=TOL, **options), x, g


def has_converged(layer):
    for solution in (layer.last_solution, layer.last_adjoint_solution):
        assert solution.converged.all(), solution
        assert (solution.residual <= layer.options.tol).all()


@every_backend
@every_shape
def test_values_and_gradients_are_those_of_float64(backend, shape):
    layer, x, g = problem(shape, backend=backend)
    z, *grads = run(layer, x, g)
    Exact(layer.cell, x, g).check(z, *grads)
    has_converged(layer)


@every_backend
@pytest.mark.parametrize("solver", ["picard", "anderson", "heavy_ball"])
def test_every_solver(backend, solver):
    layer, x, g = problem((33, 19), backend=backend, solver=solver, adjoint=solver)
    z, *grads = run(layer, x, g)
    Exact(layer.cell, x, g).check(z, *grads)
    has_converged(layer)


def test_an_answer_that_is_too_far_away_is_noticed():
    layer, x, g = problem((65, 63), backend="reference")
    exact = Exact(layer.cell, x, g)
    z, grad_x, grad_weight = run(layer, x, g)
    exact.check(z, grad_x, grad_weight)
    loose = DEQLayer(layer.cell, tol=200 * TOL, backend="reference")
    with pytest.raises(AssertionError, match=r"^z:"):
        exact.check(*run(loose, x, g))
    mild = grad_x * (1 + 200 * TOL)
    with pytest.raises(AssertionError, match="dL/dx:"):
        exact.check(z, mild, grad_weight)
    with pytest.raises(AssertionError, match="dL/dW:"):
        exact.check(z, grad_x, grad_weight * (1 + 2000 * TOL))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(backend, dtype):
    layer, x, g = problem((40, 21), dtype, backend=backend)
    z, *grads = run(layer, x, g)
    assert z.dtype == grads[0].dtype == grads[1].dtype == dtype
    product = torch.bfloat16 if dtype == torch.bfloat16 else None
    Exact(layer.cell, x, g).check(z, *grads, product=product)
    has_converged(layer)


@every_backend
def test_autocast(backend):
    layer, x, g = problem((40, 21), backend=backend)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        z, *grads = run(layer, x, g)
    # What autocast rounds is the injection; the solve runs in float32 and is rounded at its end.
    Exact(layer.cell, x, g).check(z.to(torch.bfloat16), *grads, product=torch.bfloat16)
    has_converged(layer)


@every_backend
def test_inputs_that_are_not_contiguous(backend):
    d, batch = 33, 18
    cell = make_cell(d).to(DEVICE)
    wide = torch.randn(2 * d, 2 * batch, device=DEVICE)
    x, g = wide[::2, ::2].t(), torch.randn(1, d, device=DEVICE).expand(batch, d)
    assert not x.is_contiguous()
    layer = DEQLayer(cell, tol=TOL, backend=backend)
    z, *grads = run(layer, x, g)
    Exact(cell, x, g).check(z, *grads)


class Transposed(nn.Module):
    """A weight that is a view of its parameter."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.t().contiguous())

    def forward(self):
        return self.weight.t()


@every_backend
def test_a_weight_that_is_not_contiguous(backend):
    plain, x, g = problem((33, 18), backend=backend)
    cell = AffineCell(33, 33, weight=Transposed(plain.cell.weight.weight.detach())).to(DEVICE)
    cell.injection.load_state_dict(plain.cell.injection.state_dict())
    z, grad_x, grad_weight = run(DEQLayer(cell, tol=TOL, backend=backend), x, g)
    Exact(plain.cell, x, g).check(z, grad_x, grad_weight.t())


@every_backend
def test_an_empty_batch(backend):
    layer, x, g = problem((24, 0), backend=backend)
    z, grad_x, grad_weight = run(layer, x, g)
    assert z.shape == grad_x.shape == (0, 24)
    assert not grad_weight.any()


@every_backend
def test_a_nan_sample_harms_no_other(backend):
    layer, x, g = problem((33, 70), backend=backend, on_failure="ignore")
    exact = Exact(layer.cell, x, g)
    good = torch.ones(70, dtype=torch.bool)
    good[[3, 40, 69]] = False
    x = x.clone()
    x[3, 5], x[40, 0], x[69] = torch.nan, torch.inf, -torch.inf
    z, grad_x, grad_weight = run(layer, x, g)
    exact.check(z, grad_x, grad_weight, good=good)
    status = layer.last_solution.status.cpu()
    assert (status[~good] == Status.NONFINITE).all()
    assert (status[good] == Status.CONVERGED).all()
    assert not grad_x.cpu()[~good].any()
    assert not z.detach().cpu()[~good].any()


@every_backend
def test_a_start_near_the_solution_takes_fewer_iterations(backend):
    layer, x, g = problem((48, 30), backend=backend)
    z, *_ = run(layer, x, g)
    cold = layer.last_solution.iterations
    layer(x, z0=z.detach())
    assert (layer.last_solution.iterations < cold).all()


@every_backend
def test_a_failure_is_reported(backend):
    layer, x, _ = problem((48, 30), backend=backend, max_iter=1, on_failure="raise")
    try:
        with pytest.raises(ConvergenceError, match="30 of 30 samples did not converge"):
            layer(x)
    except BackendError as reason:
        pytest.skip(str(reason))


@every_backend
def test_a_solve_on_a_side_stream_does_not_touch_the_default_one(backend):
    layer, x, g = problem((96, 40), backend=backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(layer, x, g)
    torch.cuda.synchronize()
    fresh = torch.randn_like(x)
    blocked = torch.cuda.Event()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda._sleep(4_000_000_000)  # cycles: two seconds or so
    blocked.record()
    with torch.cuda.stream(side):
        z = layer(fresh.requires_grad_())
    side.synchronize()
    assert not blocked.query(), "the solve waited for the default stream"
    with torch.cuda.stream(side):
        grads = torch.autograd.grad(z, (fresh, layer.cell.weight.weight), g)
    side.synchronize()
    # Work that went to the default stream has not run yet: its results would be wrong here.
    Exact(layer.cell, fresh, g).check(z, *grads)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@every_backend
def test_a_device_that_is_not_the_current_one(backend):
    layer, x, g = problem((65, 20), device="cuda:1", backend=backend)
    assert torch.cuda.current_device() == 0
    z, *grads = run(layer, x, g)
    assert z.device == grads[0].device == torch.device("cuda:1")
    Exact(layer.cell, x, g).check(z, *grads)


def test_waits_are_counted():
    x = torch.randn(8, device=DEVICE)
    calls = profiled({"three": lambda: [x.sum().item() for _ in range(3)]}, x.device)["three"]
    assert calls.waits == 3
    assert calls.launches >= 3


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("shape", [(64, 32), (256, 512), (1024, 256)], ids=str)
def test_the_host_waits_at_most_once_for_a_solve(backend, shape):
    layer, x, g = problem(shape, backend=backend)
    for _ in range(3):
        run(layer, x, g)
    specs = layer._specs
    if "reference" in specs.forward.engines_chosen + specs.adjoint.engines_chosen:
        pytest.skip("no engine of this backend has this solve: it is the reference's loop")
    x.requires_grad_()

    def step():
        return torch.autograd.grad(layer(x), (x, layer.cell.weight.weight), g)

    calls = profiled({"forward": lambda: layer(x.detach()), "both": step}, x.device)
    assert calls["forward"].launches, "the profiler saw nothing"
    assert calls["forward"].waits <= 1, calls
    assert calls["both"].waits <= 2, calls


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"backend": "cpp"}, torch.float32, "works on CPU tensors"),
        ({"backend": "triton"}, torch.float64, "float64"),
        ({"backend": "cuda", "solver": Energy()}, torch.float32, "minres|energy|extension"),
        ({"backend": "reference", "precision": "mixed"}, torch.float32, "low-precision"),
        ({"backend": "triton", "precision": "mixed"}, torch.float64, "float64"),
    ],
    ids=str,
)
def test_a_backend_that_cannot_be_had_says_so(options, dtype, message):
    cell = AffineCell(12, 12, weight="symmetric", scale=0.5, dtype=dtype, device=DEVICE)
    layer = DEQLayer(cell, **options)
    with pytest.raises(BackendError, match=message):
        layer(torch.randn(4, 12, dtype=dtype, device=DEVICE))


def test_second_derivatives_are_those_of_the_cpu():
    cell = make_cell(5, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)

    def penalty(device):
        layer = DEQLayer(cell.to(device), tol=1e-12, max_iter=300)
        at = x.to(device).requires_grad_()
        (grad,) = torch.autograd.grad(layer(at).square().sum(), at, create_graph=True)
        weight = layer.cell.weight.weight
        return torch.autograd.grad(grad.square().sum(), (at, weight))

    expected = [g.cpu() for g in penalty("cpu")]
    for found, exact in zip(penalty(DEVICE), expected, strict=True):
        torch.testing.assert_close(found.cpu(), exact, rtol=1e-8, atol=1e-9)
