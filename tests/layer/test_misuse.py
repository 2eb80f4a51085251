"""What does not exist or does not fit raises, and says what does."""

import pytest
import torch
from layer_cases import Residual, affine

from fastdeq import (
    GMRES,
    AffineCell,
    Anderson,
    BackendError,
    DEQLayer,
    Orthogonal,
    Picard,
    fixed_point,
    ops,
)
from fastdeq.backends import extension


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
def test_backend_that_cannot_run_raises_and_says_why(make_layer, backend, monkeypatch):
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
        real = ops.anderson_mix.reference
        monkeypatch.setattr(ops.anderson_mix, "reference", lambda *a: called.append(1) or real(*a))
        other(x)
        assert called
    torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-6)
