"""What does not exist or does not fit raises, and says what does."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from layer_cases import Residual, affine

from fastdeq import (
    GMRES,
    AffineCell,
    Anderson,
    BackendError,
    DEQLayer,
    Energy,
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
        ({"gradient": "phantoms"}, ValueError, "'implicit', 'one_step'"),
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
        ({"max_iter": 2**63}, ValueError, "from 1 to 2147483646, such as 100, got 9223372"),
        ({"max_iter": 2**31 - 1}, ValueError, "integer from 1 to 2147483646"),
        ({"max_iter": -(2**40)}, ValueError, "integer from 1 to 2147483646"),
        ({"max_iter": np.uint64(2**63)}, ValueError, "integer from 1 to 2147483646"),
        ({"max_iter": 100.0}, ValueError, r"an integer .* got 100\.0"),
        ({"max_iter": np.float32(7)}, ValueError, "an integer"),
        ({"max_iter": True}, ValueError, "an integer .* got True"),
        ({"max_iter": None}, ValueError, "an integer .* got None"),
        ({"adjoint_max_iter": 2**31}, ValueError, "adjoint_max_iter .* 1 to 2147483646"),
        ({"adjoint_max_iter": False}, ValueError, "adjoint_max_iter must be an integer"),
        ({"tol": None}, ValueError, "tol must be a finite number"),
        ({"tol": True}, ValueError, "tol must be a finite number"),
        ({"tol": 10**400}, ValueError, "tol must be a finite number"),
        ({"tol": np.float32("nan")}, ValueError, "tol must be a finite number"),
        ({"adjoint_tol": float("nan")}, ValueError, "adjoint_tol must be a finite number"),
        ({"adjoint_tol": float("inf")}, ValueError, "adjoint_tol must be a finite number"),
        ({"solver": "neumann"}, ValueError, "adjoint='neumann'.*'picard', 'anderson'"),
        ({"solver": "minres"}, ValueError, "adjoint='minres'"),
        ({"solver": GMRES(restart=7)}, ValueError, r"adjoint=GMRES\(restart=7\)"),
        ({"adjoint": "energy"}, ValueError, "solver='energy'.*'neumann', 'gmres'"),
        ({"adjoint": Energy()}, ValueError, r"solver=Energy\("),
        ({"adjoint": Energy}, TypeError, "solver object"),
    ],
    ids=str,
)
def test_options_that_do_not_exist(options, error, message):
    with pytest.raises(error, match=message):
        DEQLayer(affine(), **options)
    with pytest.raises(error, match=message):
        fixed_point(torch.cos, torch.zeros(1, 1), **options)


@pytest.mark.parametrize("integer", [np.int8(7), np.int64(7), np.uint16(7), 7])
@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), Fraction(1, 2), 0.5])
def test_numbers_of_other_libraries_are_taken(integer, number):
    options = {"max_iter": integer, "adjoint_max_iter": integer, "tol": number}
    layer = DEQLayer(affine(), adjoint_tol=number, **options)
    assert (layer.options.max_iter, layer.options.tol) == (7, 0.5)
    assert layer.options.adjoint_limits() == {"tol": 0.5, "atol": 0.0, "max_iter": 7}
    kept = [getattr(layer.options, name) for name in (*options, "adjoint_tol")]
    assert [type(value) for value in kept] == [int, int, float, float]
    layer(torch.randn(2, 6)).sum().backward()


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_the_largest_limit_can_be_had(make_layer, solver):
    layer = make_layer(solver=solver, max_iter=2**31 - 2)
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.last_solution.converged.all()
    assert layer.last_adjoint_solution.converged.all()


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
        (torch.zeros(3, 5), ValueError, r"needs \(\.\.\., 6\)"),
        (torch.zeros(5), ValueError, r"needs \(\.\.\., 6\)"),
        (torch.zeros(2, 6, 3), ValueError, r"needs \(\.\.\., 6\)"),
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
    with pytest.raises(TypeError, match="int64; it must be floating point or complex"):
        fixed_point(torch.cos, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="leading batch dimension"):
        fixed_point(lambda z: z, (torch.tensor(0.0), torch.zeros(2)))
    with pytest.raises(ValueError, match="differ in batch size"):
        fixed_point(lambda z: z, (torch.zeros(2, 2), torch.zeros(3, 2)))


class Keyed(torch.nn.Module):
    def forward(self, z, x, *, key=None):
        return 0.5 * z + x


@pytest.mark.parametrize(
    "cell",
    [affine(), Residual(), Keyed(), lambda z, x: 0.5 * z + x],
    ids=["affine", "module", "keyword", "function"],
)
def test_a_start_given_by_position(cell):
    x = torch.zeros(3, 6)
    with pytest.raises(TypeError, match=r"does not fit .*given by keyword: layer\(x, z0") as caught:
        DEQLayer(cell)(x, x)
    assert "argument" in str(caught.value.__cause__)


def test_a_cell_that_takes_other_arguments():
    x = torch.zeros(3, 6)
    with pytest.raises(TypeError, match=r"calls <lambda>\(z, x\), which does not fit") as caught:
        DEQLayer(lambda z: 0.5 * z)(x)
    assert "z0" not in str(caught.value)
    with pytest.raises(TypeError, match=r"<lambda>\(z, x, context\[0\], context\[1\]\)") as caught:
        DEQLayer(lambda z, x, a: 0.5 * z)(x, x, x)
    assert "z0" not in str(caught.value)


def test_a_type_error_within_the_cell_stays_as_it_is():
    def cell(z, x, word):
        return z + word

    with pytest.raises(TypeError, match="unsupported operand") as caught:
        DEQLayer(cell)(torch.zeros(3, 6), "word")
    assert caught.value.__cause__ is None
    with pytest.raises(TypeError, match=r"add\(\)"):  # no signature to compare with
        DEQLayer(torch.add)(torch.zeros(3, 6), 1, 2)


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
