"""A study from its runs to its tables: resumed, interrupted, in parallel, with failures."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import signal
import subprocess
import sys
import time

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from idx_files import write_mnist
from rich.console import Console

pytest.importorskip("sklearn")
pytest.importorskip("joblib")

from fastdeq.study import Characters, Images, Initial, Study, jobs
from fastdeq.study.command import perform
from fastdeq.study.jobs import jobs_of, run_all
from fastdeq.study.store import METADATA_KEY, Store

SMALL = Study(
    tasks=["digits", "characters"],
    weights=["dense", "symmetric"],
    regimes=["kept"],
    conventions=["spectral_radius"],
    seeds=1,
    images=Images(
        scales=[0.5, 4.0],
        activations=["tanh"],
        methods=["auto/implicit", "auto/phantom"],
        features=8,
        epochs=1,
    ),
    characters=Characters(
        scales=[0.5], methods=["auto/implicit"], features=8, context=4, windows=32, epochs=1
    ),
    initial=Initial(scales=[0.5], activations=["identity", "relu"], features=16, draws=3),
)
# What differs between two runs of the same.
NOT_REPEATED = ["seconds"]


def silent() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *perform(SMALL, folder, jobs=1, console=silent())


def equal(left: pd.DataFrame, right: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(
        left.drop(columns=NOT_REPEATED, errors="ignore"),
        right.drop(columns=NOT_REPEATED, errors="ignore"),
        check_exact=True,
    )


def test_tables_have_a_row_for_each_run(whole):
    _, training, initial = whole
    assert len(training) == 2 * 2 * 2 + 2
    assert len(initial) == 4
    assert (training["error"] == "").all()
    assert set(training["regime"]) == {"initialised", "kept"}
    symmetric = training[training["weight"] == "symmetric"]
    assert (symmetric["entry_scale"] == symmetric["scale"] / 2).all()
    images = training[training["task"] == "digits"]
    assert (images["updates"] == math.ceil(1347 / 64)).all()
    assert images["test_accuracy"].between(0.2, 1).sum() >= 6
    phantom = training[training["gradient"] == "phantom"]
    assert phantom["backward_converged"].isna().all()
    assert training[training["gradient"] == "implicit"]["backward_converged"].notna().all()


def test_traces_and_spectra(whole):
    row = whole[1].query("task == 'digits' and weight == 'symmetric'").iloc[0]
    assert row["trace_step"][-1] == row["updates"]
    assert len(row["trace_step"]) == len(row["trace_loss"]) == 22
    # One epoch, and a stretch for each step; sums of 22 numbers in float32.
    assert row["train_loss"] == pytest.approx(sum(row["trace_loss"]) / 22, rel=1e-5)
    assert row["test_loss"] != pytest.approx(row["train_loss"], rel=1e-3)
    for name in ("weight", "jacobian"):
        assert row[f"{name}_before"] != row[f"{name}_after"]
    for name in ("weight_before", "weight_after", "jacobian_before", "jacobian_after"):
        assert len(row[name]) == 2 * 8
    imaginary = torch.tensor(row["weight_after"])[1::2]
    assert imaginary.abs().max() < 1e-5  # of a symmetric W


def test_parquet_carries_the_settings_as_json(whole):
    folder, training, _ = whole
    about = json.loads(pq.read_schema(folder / "results.parquet").metadata[METADATA_KEY])
    assert about["settings"]["images"]["features"] == 8
    assert about["machine"]["torch"] == torch.__version__
    assert json.loads((folder / "study.json").read_text())["settings"] == about["settings"]
    read = pd.read_parquet(folder / "results.parquet")
    assert read["key"].tolist() == training["key"].tolist()


def test_a_finished_study_trains_nothing_again(whole, monkeypatch):
    folder, training, initial = whole
    monkeypatch.setattr(jobs, "run", lambda job: pytest.fail("trained again"))
    again = perform(SMALL, folder, jobs=1, console=silent())
    pd.testing.assert_frame_equal(again[0], training)
    pd.testing.assert_frame_equal(again[1], initial)


def test_a_study_with_gaps_comes_to_the_same_as_one_without(whole, tmp_path):
    """Files lost, half written or of a run that failed: these runs are made again."""
    folder, training, initial = whole
    store = Store(tmp_path)
    for part, table in (("runs", training), ("initial", initial)):
        for i, key in enumerate(table["key"]):
            text = (folder / part / f"{key}.json").read_text()
            if i % 4 == 1:
                store.put(part, key, json.loads(text))
            elif i % 4 == 2:
                (tmp_path / part / f"{key}.json").write_text(text[:40])
            elif i % 4 == 3:
                store.put(part, key, {**json.loads(text), "error": "RuntimeError: lost"})
    resumed = perform(SMALL, tmp_path, jobs=1, console=silent())
    equal(resumed[0], training)
    equal(resumed[1], initial)


def test_more_seeds_extend_a_study(whole, tmp_path):
    more = dataclasses.replace(SMALL, seeds=2, tasks=["digits"])
    known = {job.key for job in jobs_of(SMALL)}
    assert sum(job.key in known for job in jobs_of(more)) == 8 + 4


def test_two_processes_come_to_the_same_as_one(whole, tmp_path):
    _, training, initial = whole
    spread = perform(SMALL, tmp_path, jobs=2, console=silent())
    equal(spread[0], training)
    equal(spread[1], initial)


def test_dask_comes_to_the_same(whole):
    distributed = pytest.importorskip("distributed")
    _, training, _ = whole
    some = [job for job in jobs_of(SMALL) if job.part == "runs"][:3]
    cluster = distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    )
    with cluster:
        rows = {job.key: row for job, row in run_all(some, scheduler=cluster.scheduler_address)}
    for key, row in rows.items():
        known = training[training["key"] == key].iloc[0]
        assert row["train_loss"] == known["train_loss"]
    assert len(rows) == 3


def test_a_run_that_fails_is_a_row_and_ends_no_other(tmp_path, monkeypatch):
    train = jobs.train

    def planted(dataset, config):
        if config.scale == 4.0:
            raise RuntimeError("planted")
        return train(dataset, config)

    monkeypatch.setattr(jobs, "train", planted)
    study = dataclasses.replace(SMALL, tasks=["digits"])
    training, _ = perform(study, tmp_path, jobs=1, console=silent())
    failed = training[training["error"] != ""]
    assert set(failed["error"]) == {"RuntimeError: planted"}
    assert (failed["scale"] == 4.0).all()
    assert failed["test_accuracy"].isna().all()
    assert len(failed) == 4
    assert not Store(tmp_path).has("runs", failed["key"].iloc[0])  # it will be tried again


def test_mnist_without_its_files_is_said_before_the_first_run(tmp_path):
    study = dataclasses.replace(SMALL, tasks=["mnist"], mnist=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        perform(study, tmp_path / "out", jobs=1, console=silent())
    assert not list((tmp_path / "out").glob("initial/*"))


def test_mnist_by_its_folder(tmp_path):
    write_mnist(tmp_path, suffix=".gz")
    study = dataclasses.replace(
        SMALL, tasks=["mnist"], mnist=str(tmp_path), weights=["dense"], initial=Initial(scales=[])
    )
    training, initial = perform(study, tmp_path / "out", jobs=1, console=silent())
    assert set(training["task"]) == {"mnist"}
    assert (training["error"] == "").all()
    assert (training["updates"] == 1).all()  # twelve images
    assert len(training) == 4
    assert len(initial) == 0


def arguments(folder) -> list[str]:
    settings = [
        *("--tasks", "[digits]", "--weights", "[dense]", "--seeds", "2", "--jobs", "1"),
        *("--images.scales", "[0.5, 0.7, 0.9, 1.2]", "--images.activations", "[tanh]"),
        *("--images.methods", "[auto/implicit]", "--images.features", "16"),
        *("--initial.scales", "[0.5]", "--initial.features", "16", "--initial.draws", "3"),
    ]
    return [sys.executable, "-m", "fastdeq", "study", *settings, "--out", str(folder)]


def finished(folder) -> int:
    return len(list(folder.glob("runs/*.json")))


def test_an_interrupted_study_continues_and_comes_to_the_same(tmp_path):
    """By SIGINT as from Ctrl-C, then by SIGKILL, then to the end."""
    broken = tmp_path / "broken"
    for signal_number in (signal.SIGINT, signal.SIGKILL):
        before = finished(broken)
        process = subprocess.Popen(
            arguments(broken), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 120
        while finished(broken) <= before + 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal_number)
        said = process.communicate(timeout=60)[0]
        assert before < finished(broken) < 8
        if signal_number == signal.SIGINT:
            assert process.returncode == 130, said
            assert f"{finished(broken) + 4} of 12 runs are kept" in " ".join(said.split())
    for folder in (broken, tmp_path / "whole"):
        subprocess.run(arguments(folder), capture_output=True, timeout=200, check=True)
    tables = [pd.read_parquet(tmp_path / n / "results.parquet") for n in ("broken", "whole")]
    equal(*tables)
    assert len(tables[0]) == 8
    assert not list(broken.rglob("*.tmp"))
