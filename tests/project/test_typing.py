"""What a static type checker sees of the public functions: right calls pass, each wrong one is an
error at its line, and the names in the types are those that are valid at run time."""

import inspect
import typing

import pytest
from paths import ROOT

import fastdeq
from fastdeq import DEQLayer, failure, fixed_point, options
from fastdeq.backends import choose
from fastdeq.solvers import ADJOINT, FORWARD, solve_options

RIGHT = """
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from fastdeq import (
    GMRES, MINRES, AffineCell, Anderson, DEQLayer, Energy, HeavyBall, Neumann, Phantom, Picard,
    Reversible, Solution, Truncated, Unrolled, fixed_point, init, recommend, theory,
)
from fastdeq.diagnostics import Diagnosis, Recommendation
from fastdeq.options import AdjointName, Backend, Gradient, OnFailure, Precision, SolverName

Pair = tuple[Tensor, Tensor]


def pair(z: Pair) -> Pair:
    return z[1] / 2, z[0] / 2


def make(
    cell: nn.Module, solver: SolverName, adjoint: AdjointName, gradient: Gradient,
    precision: Precision, backend: Backend, on_failure: OnFailure,
) -> nn.Module:
    layer = DEQLayer(
        cell, solver=solver, adjoint=adjoint, gradient=gradient, precision=precision,
        backend=backend, on_failure=on_failure,
    )
    return nn.Sequential(layer)


z, s = fixed_point(torch.cos, torch.zeros(3, 1), solver="anderson", tol=1e-3)
assert_type(z, Tensor)
assert_type(s, Solution)
z, s = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(3, 1))
z, s = fixed_point(nn.Linear(3, 3), torch.zeros(2, 3))
both, s = fixed_point(pair, (torch.zeros(3, 1), torch.zeros(3, 1)), backend="reference")
assert_type(both, Pair)

def energetic(z: Tensor) -> tuple[Tensor, float]:
    return 0.5 * z, 2.0


(z, energy), s = fixed_point(energetic, torch.zeros(3, 1), has_aux=True, randomness="same")
assert_type(energy, float)
cell = AffineCell(3, 4, scale=0.9)
layer = DEQLayer(cell, solver=Anderson(window=8), adjoint=GMRES(), on_failure="raise")
x = torch.zeros(2, 3)
assert_type(layer(x), Any)
assert_type(layer(x, z0=None), Any)
assert_type(layer(x, z0=torch.zeros(2, 4)), Tensor)
general = DEQLayer(lambda z, x: pair(z))
general(x=x, z0=(torch.zeros(2, 4), torch.zeros(2, 4)))
found = layer.diagnose(x, loss=lambda z: z.sum(), names="weight.*")
assert_type(found, Diagnosis)
assert_type(found.radius.value, Tensor)
assert_type(recommend(layer, x).apply(layer), tuple[Recommendation, ...])
assert_type(theory.variance("dense", 0.5), float)
block = nn.Sequential(nn.Linear(4, 4))
assert_type(init.keep_(init.orthogonal_(block, 0.9), "orthogonal"), nn.Sequential)
assert_type(init.dense_(torch.ones(4, 4), 0.9), Tensor)
for batch_dim in (None, 1, -1, (0, 1)):
    DEQLayer(lambda z, x: z, batch_dim=batch_dim)
z, s = fixed_point(torch.cos, torch.zeros(()), batch_dim=None)
assert_type(general(x, z0=(torch.zeros(2, 4), torch.zeros(2, 4))), Pair)
for forward in (Energy(), HeavyBall(), Picard(damping=0.5)):
    DEQLayer(cell, solver=forward)
for gradient in (Phantom(steps=3), Truncated(), Unrolled(checkpoint=True), Reversible(beta=0.4)):
    DEQLayer(cell, gradient=gradient)
DEQLayer(cell, gradient="truncated")
for adjoint in (MINRES(), Neumann(), Anderson()):
    DEQLayer(lambda z, x: z, adjoint=adjoint, max_iter=7)
"""

WRONG = (
    ("DEQLayer(cell, max_iters=5)", 'did you mean "max_iter"'),
    ('DEQLayer(cell, solver="andersen")', "Literal['andersen']"),
    ('DEQLayer(cell, solver="neumann")', "Literal['neumann']"),
    ('DEQLayer(cell, adjoint="energy")', "Literal['energy']"),
    ('DEQLayer(cell, gradient="phantoms")', "Literal['phantoms']"),
    ("DEQLayer(cell, gradient=Phantom)", 'incompatible type "type[Phantom]"'),
    ("DEQLayer(cell, gradient=Phantom(tau=0.5))", '"tau"'),
    ('DEQLayer(cell, precision="float16")', "Literal['float16']"),
    ('DEQLayer(cell, backend="cpu")', "Literal['cpu']"),
    ('DEQLayer(cell, randomness="fixed")', "Literal['fixed']"),
    ('DEQLayer(cell, on_failure="warning")', "Literal['warning']"),
    ('DEQLayer(cell, max_iter="7")', 'expected "int"'),
    ('DEQLayer(cell, batch_dim="0")', 'expected "int | tuple[int, ...] | None"'),
    ("DEQLayer(cell, solver=Anderson)", 'incompatible type "type[Anderson]"'),
    ("DEQLayer(cell, solver=Anderson(widow=3))", 'did you mean "window"'),
    ("fixed_point(torch.cos, z0, tolerance=1)", '"tolerance"'),
    ('fixed_point(torch.cos, z0, solver="gmres")', "Literal['gmres']"),
    ("fixed_point(torch.cos, z0)[0].nonsense", '"Tensor" has no attribute'),
    ("fixed_point(torch.cos, (z0, z0))", "incompatible type"),
    ("layer(z0, z0=(z0, z0)).shape", "has no attribute"),
    ("layer.diagnose(z0).radii", 'has no attribute "radii"'),
    ("layer.diagnose(z0, samples='all')", 'expected "int"'),
)
HEAD = """import torch
from fastdeq import Anderson, AffineCell, DEQLayer, Phantom, fixed_point
cell = AffineCell(3, 4, scale=0.9)
layer = DEQLayer(cell)
z0 = torch.zeros(2, 4)
"""


def check(path, monkeypatch):
    """mypy's errors, by line."""
    api = pytest.importorskip("mypy.api")
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    config = ["--config-file", str(ROOT / "pyproject.toml")]
    cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
    output, trouble, _ = api.run([*config, *cache, "--no-error-summary", str(path)])
    assert not trouble, trouble
    errors = {}
    for line in output.splitlines():
        where, kind, text = line.split(": ", 2)
        file, number = where.rsplit(":", 1)
        assert file.endswith(path.name), line
        if kind == "error":
            errors.setdefault(int(number), []).append(text)
    return errors


def test_right_calls_pass(tmp_path, monkeypatch):
    path = tmp_path / "right_calls.py"
    path.write_text(RIGHT)
    exec(compile(RIGHT, str(path), "exec"), {})  # and run
    assert check(path, monkeypatch) == {}


def test_each_wrong_call_is_an_error_at_its_line(tmp_path, monkeypatch):
    path = tmp_path / "wrong_calls.py"
    path.write_text(HEAD + "\n".join(call for call, _ in WRONG) + "\n")
    errors = check(path, monkeypatch)
    first = HEAD.count("\n") + 1
    assert sorted(errors) == list(range(first, first + len(WRONG)))
    for number, (call, message) in enumerate(WRONG, first):
        assert any(message in text for text in errors[number]), (call, errors[number])


@pytest.mark.parametrize(
    ("literal", "names"),
    [
        (options.SolverName, ("auto", *FORWARD)),
        (options.AdjointName, ("auto", *ADJOINT)),
        (options.Gradient, options.GRADIENTS),
        (options.Precision, solve_options.PRECISIONS),
        (options.Backend, choose.BACKENDS),
        (options.OnFailure, failure.ON_FAILURE),
        (options.Randomness, options.RANDOMNESS),
    ],
)
def test_the_types_name_what_is_valid(literal, names):
    assert sorted(typing.get_args(literal)) == sorted(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("call", "added", "missing"),
    [
        (DEQLayer, ["keep_solutions", "on_solution"], []),
        (fixed_point, ["on_solution"], ["compact"]),
    ],
)
def test_signatures_show_the_options(call, added, missing):
    """Those of ``Options``, with the same defaults and types, and nothing that swallows others."""
    parameters = inspect.signature(call).parameters.values()
    assert not [p for p in parameters if p.kind is p.VAR_KEYWORD]
    own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    expected = inspect.signature(options.Options).parameters
    assert list(own) == [name for name in expected if name not in missing] + added
    for name in own.keys() & expected.keys():
        parameter = own[name]
        assert (parameter.default, parameter.annotation) == (
            expected[name].default,
            expected[name].annotation,
        )


def test_annotations_can_be_evaluated_and_documentation_is_kept():
    assert "tol" in typing.get_type_hints(fixed_point)
    assert "tol" in typing.get_type_hints(DEQLayer.__init__)
    assert fixed_point.__doc__.startswith("Solves")
    assert fixed_point.__module__ == "fastdeq.functional"
    assert inspect.getsource(fixed_point).count("def fixed_point(") == 1
    assert fastdeq.fixed_point is fixed_point
