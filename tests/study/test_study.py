"""The initialisation study: training runs, the report, and its optional imports."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fastdeq import study
from fastdeq.study.training import structure_drift

FAMILIES = ("dense", "orthogonal", "symmetric")


# Training


@pytest.fixture(scope="module")
def dataset():
    return study.digits()


@pytest.fixture(scope="module")
def results(dataset):
    """Two epochs of every family, at a safe scale and at one where solves fail."""
    runs = study.grid(FAMILIES, [0.5, 4.0], features=32, epochs=2, max_iter=20)
    return study.sweep(dataset, runs, Console(file=io.StringIO()))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_epochs_learn_far_more_than_chance(results, family):
    safe = next(r for r in results if r.config.weight == family and r.config.scale == 0.5)
    # Chance is 0.1; the standard error of a share of 450 is at most 0.024.
    assert safe.test_accuracy > 0.8
    assert safe.loss < 0.7 * np.log(10)
    assert safe.forward_converged > 0.99
    assert safe.backward_converged > 0.99


def test_a_harsh_run_still_gives_a_row(results):
    harsh = [r for r in results if r.config.scale == 4.0]
    assert [r.config.weight for r in harsh] == list(FAMILIES)
    for r in harsh:
        assert r.forward_converged < 0.9
        assert np.isfinite(r.loss)


def test_fields_are_sane(results):
    for r in results:
        assert 0 < r.test_accuracy < 1
        assert 1 <= r.forward_iterations <= r.config.max_iter
        assert 1 <= r.backward_iterations <= r.config.max_iter
        assert 0 <= r.forward_converged <= 1
        assert r.nonfinite == r.skipped == 0
        assert r.seconds > 0
    drift = {r.config.weight: r.structure_drift for r in results}
    assert drift["dense"] is None
    assert drift["symmetric"] == 0
    # QR in float32: a few units of rounding per entry of a 32 x 32 product.
    assert drift["orthogonal"] < 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("family", ["orthogonal", "symmetric"])
def test_structure_is_lost_where_only_the_start_has_it(dataset, family):
    config = study.Config(family, 0.5, parametrized=False, features=16, epochs=1)
    assert study.train(dataset, config).structure_drift > 0.01


def test_structure_drift_sees_a_planted_error():
    orthogonal, symmetric = (study.Config(w, 2.0) for w in ("orthogonal", "symmetric"))
    weight = 2 * torch.eye(4)
    assert structure_drift(weight, orthogonal) == 0
    assert structure_drift(weight, symmetric) == 0
    weight[0, 1] = 0.5
    assert structure_drift(weight, orthogonal) == pytest.approx(0.25)
    assert structure_drift(weight, symmetric) == pytest.approx(0.25)


def test_same_seed_same_run_and_the_global_random_state_is_left_alone(dataset):
    config = study.Config("dense", 0.5, features=8, epochs=1)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = study.train(dataset, config)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert study.train(dataset, config).loss == first.loss


def small(dataset, n=128):
    return study.Dataset(dataset.x_train[:n], dataset.y_train[:n], dataset.x_test, dataset.y_test)


def test_a_sample_with_nan_is_counted_and_spoils_nothing_else(dataset):
    poisoned = small(dataset)
    poisoned = dataclasses.replace(poisoned, x_train=poisoned.x_train.clone())
    poisoned.x_train[7, 3] = torch.nan
    result = study.train(poisoned, study.Config("dense", 0.5, epochs=4))
    assert result.nonfinite == 4  # the forward solve of that sample in every epoch
    assert result.skipped == 0
    assert result.test_accuracy > 0.5


def test_an_update_whose_gradient_is_not_finite_is_left_out(dataset, monkeypatch):
    calls, cross_entropy = [], torch.nn.functional.cross_entropy

    def planted(*args):
        calls.append(1)
        return cross_entropy(*args) * (torch.inf if len(calls) == 2 else 1)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", planted)
    result = study.train(small(dataset), study.Config("dense", 0.5, epochs=4))
    assert result.skipped == 1
    assert np.isfinite(result.loss)
    assert result.test_accuracy > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "dense", "scale": 0.0}, "scale must be positive"),
        ({"weight": "dense", "scale": float("nan")}, "scale must be positive"),
        ({"weight": "dense", "scale": 0.5, "epochs": 0}, "must be >= 1"),
        ({"weight": "densse", "scale": 0.5}, "Did you mean 'dense'"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        study.Config(**options)


# Report


def test_table_fits_a_narrow_terminal(results):
    out = io.StringIO()
    Console(file=out, width=80).print(study.table(results))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if "│" in line]
    assert [r.split("│")[1].strip() for r in rows] == [r.config.weight for r in results]
    assert f"{results[0].test_accuracy:.1%}" in rows[0]
    assert "…" not in out.getvalue()


def test_figure_is_an_image_with_something_on_it(results, tmp_path):
    path = study.figure(results, tmp_path / "figure.png")
    from matplotlib.image import imread

    pixels = imread(path)
    assert pixels.shape[1] > 1000
    # Two thin lines and six thick ones leave more than a thousand pixels of each family's colour.
    for colour in ("D55E00", "0072B2", "009E73"):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        assert (np.abs(pixels[..., :3] - rgb).max(-1) < 0.02).sum() > 1000
    study.figure(results[:1], tmp_path / "single.svg")
    with pytest.raises(ValueError, match="no results"):
        study.figure([], path)


def test_no_progress_where_the_console_is_no_terminal(dataset):
    out = io.StringIO()
    study.sweep(dataset, [study.Config("dense", 0.5, features=4, epochs=1)], Console(file=out))
    assert out.getvalue() == ""


# Imports


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_importing_fastdeq_imports_nothing_of_the_study():
    modules = "('sklearn', 'matplotlib', 'rich', 'fastdeq.study')"
    done = run_python(f"import sys, fastdeq; print([m for m in {modules} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_importing_the_study_without_extras_says_what_to_install():
    done = run_python(
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n in ('sklearn', 'rich') else find(n, *a)\n"
        "import fastdeq.study"
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "pip install fastdeq[study]" in last
    assert "scikit-learn, rich" in last
