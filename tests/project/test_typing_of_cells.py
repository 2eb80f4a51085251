"""What a static type checker sees of cells, weights and diagnostics; what is imported late."""

import inspect
import subprocess
import sys
import typing

import pytest
import torch

import fastdeq
from fastdeq import AffineCell, Orthogonal, Symmetric, diagnostics
from fastdeq.activations import ACTIVATIONS, ActivationName
from fastdeq.weights import TAGS, WEIGHTS, Tag, WeightName

RIGHT = """
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastdeq
from fastdeq import AffineCell, DEQLayer, Dense, Orthogonal, Symmetric
from fastdeq.activations import ActivationName
from fastdeq.weights import WeightName


class Mine(nn.Module):
    tags = frozenset({"symmetric"})

    def forward(self) -> Tensor:
        return torch.eye(8)


def make(activation: ActivationName, weight: WeightName) -> AffineCell:
    return AffineCell(4, 8, activation=activation, weight=weight, scale=0.5, bias=False)


cell = AffineCell(4, 8)
AffineCell(4, 8, weight=Mine(), device="cpu", dtype=torch.float64)
AffineCell(4, 8, weight=Orthogonal(8, 0.5, max_scale=0.9), activation="relu")
Symmetric(8, 0.5, max_eigenvalue=0.9, parametrized=True)
Dense(8, 0.5, device=torch.device("cpu"))
cell.injection = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
assert_type(cell.inject(torch.zeros(2, 4)), Tensor)
assert_type(Orthogonal(8, 0.5).tags, frozenset[str])
found = fastdeq.diagnostics.spectral_radius(DEQLayer(cell), torch.zeros(2, 4), tol=1e-2)
assert_type(found, fastdeq.diagnostics.Estimate)
"""

WRONG = (
    ('AffineCell(4, 8, weigth="dense")', '"weigth"'),
    ('AffineCell(4, 8, weight="densee")', "Literal['densee']"),
    ('AffineCell(4, 8, activation="tahn")', "Literal['tahn']"),
    ("AffineCell(4, 8, weight=torch.zeros(8, 8))", 'incompatible type "Tensor"'),
    ('AffineCell("4", 8)', 'expected "int"'),
    ("AffineCell(4)", '"features"'),
    ("Orthogonal(8, 0.5, max_scal=0.9)", '"max_scal"'),
    ("Orthogonal(8, 0.5, max_eigenvalue=0.9)", '"max_eigenvalue"'),
    ("Symmetric(8, 0.5, parametrised=True)", '"parametrised"'),
    ("Dense(8, 0.5, parametrized=True)", '"parametrized"'),
    ("fastdeq.diagnostics.eigenvalue_bounds(cell, tolerance=1.0)", '"tolerance"'),
    ("fastdeq.diagnostic", '"diagnostic"'),
)
BEFORE = """
import torch
import fastdeq
from fastdeq import AffineCell, Dense, Orthogonal, Symmetric

cell, x = AffineCell(4, 8), torch.zeros(2, 4)
"""


def check(tmp_path, source):
    """Lines with errors, and mypy's report."""
    api = pytest.importorskip("mypy.api")
    path = tmp_path / "uses_fastdeq.py"
    path.write_text(source)
    arguments = ["--strict", "--config-file=", "--cache-dir=.mypy_cache", "--follow-imports=silent"]
    report, problems, _ = api.run([*arguments, str(path)])
    assert problems == ""
    lines = [line for line in report.splitlines() if "error:" in line]
    return {int(line.split(":")[1]): line for line in lines}, report


def test_right_calls_pass_and_each_wrong_one_is_an_error_at_its_line(tmp_path):
    errors, report = check(tmp_path, RIGHT)
    assert errors == {}, report
    first = BEFORE.count("\n") + 1
    errors, report = check(tmp_path, BEFORE + "\n".join(call for call, _ in WRONG) + "\n")
    for number, (call, message) in enumerate(WRONG, start=first):
        assert message in errors.get(number, ""), (call, report)
    assert len(errors) == len(WRONG), report


def test_the_names_in_types_are_the_valid_ones():
    assert typing.get_args(ActivationName) == tuple(ACTIVATIONS)
    assert typing.get_args(WeightName) == tuple(WEIGHTS)
    assert typing.get_args(Tag) == TAGS


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AffineCell(4, 8, weigth="dense"), "AffineCell got .*'weigth'.*activation, bias"),
        (lambda: Orthogonal(8, 0.5, max_scal=1.0), "Orthogonal got .*Did you mean 'max_scale'"),
        (lambda: Symmetric(8, 0.5, max_scale=1.0), "valid options: device, dtype, max_eigenvalue"),
        (
            lambda: diagnostics.spectral_radius(lambda z, x: z, torch.ones(2, 3), tols=1),
            "spectral_radius .*'tol'",
        ),
        (
            lambda: diagnostics.jacobian_norm(lambda z, x: z, torch.ones(2, 3), tols=1),
            "jacobian_norm .*'tol'",
        ),
        (lambda: diagnostics.eigenvalue_bounds(None, tols=1), "eigenvalue_bounds .*'tol'"),
    ],
)
def test_messages_list_what_is_valid(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_signatures_can_be_inspected():
    assert list(inspect.signature(Orthogonal).parameters) == [
        "features",
        "scale",
        "max_scale",
        "parametrized",
        "device",
        "dtype",
    ]
    assert "device" in inspect.signature(AffineCell).parameters


def test_diagnostics_and_theory_are_imported_when_they_are_used():
    program = """
import sys, fastdeq
lazy = ("fastdeq.diagnostics", "fastdeq.theory")
assert not any(name.startswith(lazy) for name in sys.modules)
assert fastdeq.theory.variance("dense", 0.0) == 1
assert not any(name.startswith(lazy[:1]) for name in sys.modules)
assert fastdeq.diagnostics.spectral_radius.__module__ == "fastdeq.diagnostics.jacobian"
assert fastdeq.diagnostics is sys.modules["fastdeq.diagnostics"]
try:
    fastdeq.diagnosticks
except AttributeError as error:
    assert "diagnosticks" in str(error)
else:
    raise SystemExit("found")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert fastdeq.diagnostics is diagnostics
