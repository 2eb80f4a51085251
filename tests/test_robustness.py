"""Bad input, failures and edges: each has a defined outcome."""

import warnings

import pytest
import torch

from fastdeq import (
    GMRES,
    AffineCell,
    Anderson,
    BackendError,
    ConvergenceError,
    ConvergenceWarning,
    DEQLayer,
    Orthogonal,
    Picard,
    Status,
    extension,
    fixed_point,
    ops,
)

SOLVERS = [Picard(), Anderson(), Anderson(window=1)]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


class Residual(torch.nn.Module):
    """A general cell, contracting, row by row."""

    def __init__(self, n=6):
        super().__init__()
        self.linear = torch.nn.Linear(n, n)
        torch.nn.init.orthogonal_(self.linear.weight, 0.5)

    def forward(self, z, x):
        return torch.tanh(self.linear(z)) + x


def affine(n=6, d=6, **options):
    return AffineCell(n, d, activation="tanh", scale=options.pop("scale", 0.7), **options)


@pytest.fixture(params=["fused", "general"])
def make_layer(request):
    def make(**options):
        return DEQLayer(affine() if request.param == "fused" else Residual(), **options)

    return make


# --- one bad sample -------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_one_bad_sample_harms_no_other(make_layer, solver, poison):
    layer = make_layer(solver=solver, on_failure="ignore")
    x = torch.randn(5, 6)
    bad = x.clone()
    bad[2, 3] = poison
    mates = [0, 1, 3, 4]
    results = []
    for batch in (x, bad):
        batch = batch.requires_grad_()
        layer.zero_grad()
        z = layer(batch)
        z[mates].pow(2).sum().backward()
        results.append((z[mates], batch.grad[mates], [p.grad.clone() for p in layer.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
    for clean, dirty in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(clean, dirty, rtol=1e-5, atol=1e-6)
    status = layer.last_solution.status
    assert status[2] == Status.NONFINITE
    assert (status[mates] == Status.CONVERGED).all()
    assert (z[2] == 0).all()


def test_bad_sample_in_the_loss_gives_finite_gradients(make_layer):
    layer = make_layer(on_failure="ignore")
    x = torch.randn(5, 6)
    x[0] = torch.nan
    layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@every_solver
def test_map_that_turns_nan_for_one_sample_returns_its_best_finite_iterate(solver):
    def f(z):
        out = 0.5 * z + 1
        trap = torch.tensor([[False], [True], [False]]) & (z > 1.2)
        return torch.where(trap, torch.nan, out)

    z, solution = fixed_point(f, torch.zeros(3, 1), solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert z.isfinite().all()
    assert 0 < z[1, 0] <= 1.2
    torch.testing.assert_close(z[[0, 2]], torch.full((2, 1), 2.0), rtol=1e-3, atol=0)


@every_solver
def test_overflowing_map_ends_nonfinite_with_a_finite_state(solver):
    z, solution = fixed_point(
        lambda z: z**3 + 1e20, torch.ones(2, 2), solver=solver, on_failure="ignore"
    )
    assert (solution.status == Status.NONFINITE).all()
    assert z.isfinite().all()


def expansive(n):
    """relu(1e10 z + c): a negative c settles at zero, a positive one overflows in four steps."""
    cell = AffineCell(n, n, activation="relu", weight=Constant(n))
    with torch.no_grad():
        cell.injection.weight.copy_(torch.eye(n))
        cell.injection.bias.zero_()
    return cell


class Constant(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        self.w = torch.nn.Parameter(1e10 * torch.eye(n))

    def forward(self):
        return self.w


@pytest.mark.parametrize("path", ["fused", "general"])
@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
def test_sample_that_overflows_inside_has_zero_gradient(path, gradient):
    cell = expansive(2)
    inner = cell if path == "fused" else (lambda z, x: cell(z, x))
    layer = DEQLayer(inner, solver="picard", gradient=gradient, on_failure="ignore")
    x = torch.tensor([[-1.0, -2.0], [1.0, 2.0]], requires_grad=True)
    z = layer(x)
    assert layer.last_solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert z.isfinite().all()
    (z * torch.tensor([[1.0, 1.0], [5.0, 7.0]])).sum().backward()
    assert (x.grad[1] == 0).all()
    assert all((p.grad == 0).all() for p in cell.parameters())


@every_solver
def test_nan_of_one_sample_stays_in_its_row_of_the_driver(solver):
    """Through a closure, so that no layer cleans the input first."""
    c = torch.randn(4, 5, dtype=torch.float64)
    clean, _ = fixed_point(lambda z: 0.5 * torch.tanh(z) + c, torch.zeros_like(c), solver=solver)
    c = c.clone()
    c[2, 1] = torch.nan
    dirty, solution = fixed_point(
        lambda z: 0.5 * torch.tanh(z) + c, torch.zeros_like(c), solver=solver, on_failure="ignore"
    )
    mates = [0, 1, 3]
    assert torch.equal(clean[mates], dirty[mates])
    assert solution.status.tolist() == [0, 0, Status.NONFINITE, 0]


@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
def test_fused_sample_with_an_overflowing_injection_has_zero_gradient(activation):
    cell = AffineCell(3, 3, activation=activation, weight="orthogonal", scale=0.5)
    with torch.no_grad():
        cell.injection.weight.mul_(10)
    layer = DEQLayer(cell, on_failure="ignore")
    x = torch.randn(3, 3)
    x[1] = 3e38  # finite, and infinite or NaN once injected
    z = layer(x.requires_grad_())
    if activation != "tanh":
        assert layer.last_solution.status[1] == Status.NONFINITE
    g = torch.ones_like(z)
    g[1] = torch.nan if layer.last_solution.status[1] == Status.NONFINITE else 0.0
    gradients = torch.autograd.grad(z, [x, *cell.parameters()], g)
    assert all(t.isfinite().all() for t in gradients)
    assert (gradients[0][1] == 0).all()


def test_nonfinite_warm_start_starts_from_zero(make_layer):
    layer = make_layer()
    x = torch.randn(3, 6)
    expected = layer(x)
    start = torch.zeros(3, 6)
    start[1] = torch.nan
    torch.testing.assert_close(layer(x, z0=start), expected)


def test_input_that_is_not_per_sample_is_left_as_it_is():
    shared = torch.tensor([[torch.nan, 0.0]])
    layer = DEQLayer(lambda z, x: 0.5 * z + x, on_failure="ignore")
    layer(shared, z0=torch.zeros(3, 2))
    assert (layer.last_solution.status == Status.NONFINITE).all()


def test_anderson_takes_back_a_step_restarts_and_counts():
    """Below 3 the secant points at 5, where a trap waits; the fixed point is 3.4."""

    def f(z):
        gentle = torch.where(z < 3, 0.9 * z + 0.5, 0.5 * z + 1.7)
        return torch.where(z > 4, -100.0, gentle)

    z, solution = fixed_point(
        f, torch.zeros(3, 1, dtype=torch.float64), solver=Anderson(), tol=1e-8
    )
    assert solution.converged.all()
    torch.testing.assert_close(z, torch.full_like(z, 3.4), rtol=1e-7, atol=0)
    assert (solution.rejects["safeguard"] >= 1).all()


def test_counters_stop_when_their_sample_stops():
    """The first sample converges at once and is then frozen for as long as the other needs."""
    rates = torch.tensor([[0.0], [0.97]], dtype=torch.float64)
    f = lambda z: rates * torch.sin(z) + 1  # noqa: E731
    start = torch.ones(2, 1, dtype=torch.float64)
    _, solution = fixed_point(f, start, solver=Anderson(window=4), tol=1e-13)
    assert solution.iterations[0] == 0
    assert solution.iterations[1] > 4
    assert all(int(count[0]) == 0 for count in solution.rejects.values())
    assert solution.rejects["rank_cut"][1] > 0


# --- edges -----------------------------------------------------------------------------------


@every_solver
def test_one_iteration_is_one_application_of_the_cell(make_layer, solver):
    layer = make_layer(solver=solver, max_iter=1, on_failure="ignore")
    x = torch.randn(3, 6)
    z = layer(x)
    torch.testing.assert_close(z, layer.cell(torch.zeros(3, 6), x))
    assert layer.last_solution.iterations.tolist() == [1, 1, 1]
    z.sum().backward()


@pytest.mark.parametrize("adjoint", ["neumann", "gmres", "anderson"])
def test_one_adjoint_iteration(make_layer, adjoint):
    layer = make_layer(adjoint=adjoint, adjoint_max_iter=1, on_failure="ignore")
    layer(torch.randn(3, 6)).sum().backward()
    assert (layer.last_adjoint_solution.iterations <= 1).all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_gmres_spends_a_short_budget_on_an_iterate():
    cell = affine(d=40, scale=1.0)
    layer = DEQLayer(
        cell, adjoint=GMRES(restart=20), adjoint_max_iter=6, adjoint_tol=1e-9, on_failure="ignore"
    )
    layer(torch.randn(3, 6)).sum().backward()
    solution = layer.last_adjoint_solution
    assert (solution.residual < 0.5).all()


@every_solver
def test_empty_batch(make_layer, solver):
    layer = make_layer(solver=solver)
    x = torch.randn(0, 6, requires_grad=True)
    z = layer(x)
    assert z.shape == (0, 6)
    assert layer.last_solution.status.shape == (0,)
    z.sum().backward()
    assert x.grad.shape == (0, 6)
    assert "0 samples" in repr(layer.last_solution)


@every_solver
def test_single_feature(solver):
    layer = DEQLayer(affine(1, 1), solver=solver)
    layer(torch.randn(4, 1)).sum().backward()
    assert layer.last_solution.converged.all()


@every_solver
def test_start_at_the_solution_takes_no_iteration(make_layer, solver):
    layer = make_layer(solver=solver, tol=1e-3)
    x = torch.randn(3, 6)
    z = layer(x)
    layer(x, z0=z)
    assert layer.last_solution.iterations.tolist() == [0, 0, 0]


@every_solver
def test_samples_do_not_depend_on_their_batch(solver):
    # In float64: the last bits of a product depend on the batch it is part of.
    layer = DEQLayer(affine(d=32, weight="orthogonal", scale=0.9).double(), solver=solver)
    x = torch.randn(8, 6, dtype=torch.float64)
    together, iterations = layer(x), layer.last_solution.iterations
    for i in range(8):
        alone = layer(x[i : i + 1])
        assert layer.last_solution.iterations[0] == iterations[i]
        torch.testing.assert_close(alone[0], together[i], rtol=1e-6, atol=1e-6)


# --- dtypes ----------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_the_affine_cell(dtype, solver):
    layer = DEQLayer(affine(weight="orthogonal").to(dtype), solver=solver)
    x = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    z = layer(x)
    assert z.dtype == dtype
    # Narrow input is solved to a float32 residual.
    assert layer.last_solution.residual.dtype == (
        torch.float64 if dtype.itemsize == 8 else torch.float32
    )
    assert layer.last_solution.converged.all()
    z.sum().backward()
    assert x.grad.dtype == dtype
    w, c = layer.cell.recurrent_weight().double(), layer.cell.inject(x).double()
    exact = torch.zeros_like(c)
    for _ in range(300):
        exact = torch.tanh(exact @ w.T + c)
    # The residual 1e-4 over 1 - |W| <= 1 - 0.7 (rounded W: |W| < 0.72), then rounding to the dtype.
    allowed = (1e-4 / 0.28 + torch.finfo(dtype).eps) * exact.norm(dim=1)
    assert ((z.double() - exact).norm(dim=1) <= allowed).all()


def test_general_cell_in_bfloat16():
    layer = DEQLayer(Residual().bfloat16(), tol=2e-2)
    z = layer(torch.randn(4, 6, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16
    z.sum().backward()
    assert layer.last_solution.converged.all()


@pytest.mark.parametrize("kind", ["fused", "general"])
def test_autocast(kind):
    cell = affine() if kind == "fused" else Residual()
    layer = DEQLayer(cell, tol=1e-4 if kind == "fused" else 2e-2)
    x = torch.randn(4, 6)
    exact = DEQLayer(cell, tol=1e-6)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
    z.float().sum().backward()  # outside autocast: the gradient follows the forward's state
    assert layer.last_solution.converged.all()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in layer.parameters())
    # bfloat16 rounds the injection by 2^-8, which the inverse of 1 - 0.9 enlarges at most tenfold.
    assert ((z.float() - exact).norm(dim=1) <= 0.08 * exact.norm(dim=1).clamp(min=1)).all()


# --- failure policy --------------------------------------------------------------------------


def hard_layer(**options):
    return DEQLayer(affine(6, 32, scale=8.0), max_iter=5, **options)


def test_warns_once_per_layer():
    layer = hard_layer()
    x = torch.randn(3, 6)
    with pytest.warns(
        ConvergenceWarning, match=r"3 of 3 samples did not converge \(sample \d: MAX_ITER"
    ):
        z = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    with pytest.warns(ConvergenceWarning, match="adjoint"):
        z.sum().backward()
    with pytest.warns(ConvergenceWarning):
        hard_layer()(x)


def test_raise_names_the_worst_and_what_to_try():
    with pytest.raises(
        ConvergenceError, match=r"sample \d.*residual.*To try: raise max_iter"
    ) as caught:
        hard_layer(on_failure="raise")(torch.randn(3, 6))
    assert caught.value.solution.status.shape == (3,)


def test_raise_also_from_the_backward_pass():
    layer = DEQLayer(
        affine(6, 32, scale=0.9), adjoint_max_iter=2, adjoint_tol=1e-9, on_failure="raise"
    )
    z = layer(torch.randn(3, 6))
    with pytest.raises(ConvergenceError, match="adjoint"):
        z.sum().backward()


def test_the_best_iterate_is_returned_not_the_last():
    layer = DEQLayer(affine(6, 32, scale=6.0), max_iter=40, solver="picard", on_failure="ignore")
    x = torch.randn(4, 6)
    z = layer(x)
    residual = layer.cell(z, x) - z
    relative = residual.norm(dim=1) / layer.cell(z, x).norm(dim=1)
    torch.testing.assert_close(relative, layer.last_solution.residual, rtol=1e-4, atol=1e-6)
    residuals, state = [], torch.zeros(4, 32)
    for _ in range(41):
        following = layer.cell(state, x)
        residuals.append((following - state).norm(dim=1) / following.norm(dim=1))
        state = following
    best = torch.stack(residuals).amin(0)
    torch.testing.assert_close(layer.last_solution.residual, best, rtol=1e-3, atol=1e-6)


# --- misuse ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "andersen"}, ValueError, r"'picard', 'anderson'.*Did you mean 'anderson'"),
        ({"solver": "gmres"}, ValueError, "'picard', 'anderson'"),
        ({"solver": 3}, TypeError, "name .* or a solver object"),
        ({"solver": Anderson}, TypeError, "solver object"),
        ({"adjoint": "cg2"}, ValueError, "'neumann', 'gmres'"),
        (
            {"stop_mode": "rel"},
            TypeError,
            "unknown option 'stop_mode'.*valid options: adjoint, .*tol",
        ),
        ({"max_iters": 5}, TypeError, "Did you mean 'max_iter'"),
        ({"gradient": "phantom"}, ValueError, "'implicit', 'one_step'"),
        ({"precision": "float16"}, ValueError, "'auto', 'float32'"),
        ({"backend": "cpu"}, ValueError, "'cpp'"),
        ({"on_failure": "warning"}, ValueError, "Did you mean 'warn'"),
        ({"tol": -1.0}, ValueError, "tol must be"),
        ({"tol": float("nan")}, ValueError, "tol must be"),
        ({"tol": "tight"}, ValueError, "tol must be"),
        ({"adjoint_tol": -1.0}, ValueError, "adjoint_tol must be"),
        ({"max_iter": 0}, ValueError, "max_iter must be"),
        ({"max_iter": 2.5}, ValueError, "max_iter must be"),
        ({"adjoint_max_iter": 0}, ValueError, "adjoint_max_iter must be"),
    ],
    ids=str,
)
def test_options_that_do_not_exist(options, error, message):
    with pytest.raises(error, match=message):
        DEQLayer(affine(), **options)
    with pytest.raises(error, match=message):
        fixed_point(torch.cos, torch.zeros(1, 1), **options)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: AffineCell(3, 4, activation="tahn", scale=1.0), ValueError, "Did you mean 'tanh'"),
        (lambda: AffineCell(3, 4, weight="ortho", scale=1.0), ValueError, "'orthogonal'"),
        (lambda: AffineCell(3, 4, weight=7), TypeError, "a module that returns W"),
        (lambda: AffineCell(3, 4), ValueError, "scale=0.9"),
        (lambda: AffineCell(3, 4, scale=float("inf")), ValueError, "finite scale"),
        (
            lambda: AffineCell(3, 4, weight=Orthogonal(4, 0.9), scale=0.5),
            ValueError,
            "weight object",
        ),
        (lambda: AffineCell(3, 0, scale=1.0), ValueError, "must be >= 1"),
        (lambda: AffineCell(3, 4, scale=1.0, biass=True), TypeError, "Did you mean 'bias'"),
        (lambda: DEQLayer(5), TypeError, "a module or function"),
        (lambda: DEQLayer(AffineCell), TypeError, "a module or function"),
        (lambda: Anderson(widow=3), TypeError, "Did you mean 'window'"),
        (lambda: GMRES(window=3), TypeError, "valid options: restart"),
        (lambda: Anderson(window=0), ValueError, "window must be"),
        (lambda: Anderson(window=2.5), ValueError, "window must be an integer"),
        (lambda: Anderson(damping=0.0), ValueError, r"damping must be in \(0, 1\]"),
        (lambda: Anderson(safeguard=0.5), ValueError, "safeguard must be >= 1"),
        (lambda: Picard(damping=float("nan")), ValueError, "damping must be"),
        (lambda: GMRES(restart=0), ValueError, "restart must be"),
    ],
)
def test_objects_that_cannot_be_built(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 5), ValueError, r"needs \(B, 6\)"),
        (torch.zeros(6), ValueError, r"needs \(B, 6\)"),
        (torch.zeros(2, 3, 6), ValueError, "Flatten"),
        (torch.zeros(3, 6, dtype=torch.long), TypeError, "floating point"),
        (torch.zeros(3, 6, dtype=torch.float64), TypeError, "convert one of them"),
        (torch.zeros(3, 6, device="meta"), ValueError, "on meta"),
        ([1.0, 2.0], TypeError, "must be a tensor"),
    ],
    ids=lambda v: str(getattr(v, "shape", v)),
)
def test_input_that_does_not_fit(x, error, message):
    with pytest.raises(error, match=message):
        DEQLayer(affine())(x)


def test_start_that_does_not_fit():
    layer, general = DEQLayer(affine()), DEQLayer(Residual())
    x = torch.zeros(3, 6)
    with pytest.raises(ValueError, match=r"must have shape \(3, 6\)"):
        layer(x, z0=torch.zeros(2, 6))
    with pytest.raises(TypeError, match="floating point"):
        layer(x, z0=torch.zeros(3, 6, dtype=torch.int))
    with pytest.raises(ValueError, match="must be equal"):
        DEQLayer(lambda z, x: z[:, :2])(x)
    with pytest.raises(TypeError, match="a state of tensors"):
        DEQLayer(lambda z, x: None)(x)
    with pytest.raises(TypeError, match="pass z0"):
        general([x])
    with pytest.raises(TypeError, match="real floating point"):
        fixed_point(torch.cos, torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="leading batch dimension"):
        fixed_point(torch.cos, torch.tensor(0.0))
    with pytest.raises(ValueError, match="differ in batch size"):
        fixed_point(lambda z: z, (torch.zeros(2, 2), torch.zeros(3, 2)))


class WrongShape(torch.nn.Module):
    def forward(self):
        return torch.zeros(3, 3)


def test_weight_object_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"WrongShape returned a weight of shape \(3, 3\)"):
        DEQLayer(AffineCell(6, 6, weight=WrongShape()))(torch.zeros(2, 6))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backend_that_cannot_serve_raises_and_says_why(make_layer, backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        BackendError, match=r"CUDA tensors, and these are on cpu.*Available here: 'auto'"
    ):
        make_layer(backend=backend)(torch.zeros(2, 6))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_backends_agree(make_layer, backend, monkeypatch):
    if backend == "cpp" and extension.module is None:
        pytest.skip(f"no compiled extension: {extension.why_missing}")
    layer = make_layer(solver="anderson", tol=1e-6)
    x = torch.randn(4, 6)
    expected = layer(x)
    other = DEQLayer(layer.cell, solver="anderson", tol=1e-6, backend=backend)
    if backend == "reference":  # and it is really the reference that runs
        called = []
        real = ops.reference.anderson_mix
        table = {**ops._ANDERSON_MIX, "reference": lambda *a: called.append(1) or real(*a)}
        monkeypatch.setattr(ops, "_ANDERSON_MIX", table)
        other(x)
        assert called
    torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-6)
