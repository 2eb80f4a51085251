"""The settings of a study, and which runs they ask for."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("jsonargparse")

from fastdeq.study import Characters, Config, Images, Initial, Study, quick
from fastdeq.study.command import study_from
from fastdeq.study.jobs import jobs_of

ONE = Study(
    tasks=["digits"],
    seeds=2,
    images=Images(scales=[0.5, 1.0], activations=["tanh"], methods=["auto/implicit"]),
    initial=Initial(scales=[0.5], activations=["identity"]),
)


def test_each_run_is_there_once():
    runs = list(Study().runs())
    assert len({run.key for run in runs}) == len(runs)


def test_dense_weights_have_no_regime_to_choose():
    runs = [run for run in ONE.runs() if run.seed == 0]
    regimes = {(run.weight, run.regime) for run in runs}
    assert regimes == {
        ("dense", "initialised"),
        ("orthogonal", "initialised"),
        ("orthogonal", "kept"),
        ("symmetric", "initialised"),
        ("symmetric", "kept"),
    }
    kept = dataclasses.replace(ONE, regimes=["kept"])
    assert {run.regime for run in kept.runs() if run.weight == "dense"} == {"initialised"}


@pytest.mark.parametrize(
    ("conventions", "radii"),
    [
        (["spectral_radius"], [0.5, 1.0]),
        (["variance"], [1.0, 2.0]),
        (["spectral_radius", "variance"], [0.5, 1.0, 2.0]),
    ],
)
def test_a_symmetric_weight_has_twice_the_radius_at_equal_variance(conventions, radii):
    study = dataclasses.replace(ONE, conventions=conventions, seeds=1, regimes=["initialised"])
    scales = {w: sorted(r.scale for r in study.runs() if r.weight == w) for w in study.weights}
    assert scales == {"dense": [0.5, 1.0], "orthogonal": [0.5, 1.0], "symmetric": radii}


def test_the_grid_of_the_default_holds_the_double_of_each_scale_up_to_2():
    # Else families could not be compared at equal variance without further runs.
    radii = {run.scale for run in Study().runs() if run.task == "digits"}
    assert {2 * s for s in Study().images.scales} <= radii


def test_each_task_has_the_settings_of_its_model():
    study = dataclasses.replace(quick(), tasks=["digits", "characters"], seeds=1)
    found = {run.task: (run.features, run.activation, run.optimizer) for run in study.runs()}
    assert found == {"digits": (64, "tanh", "sgd"), "characters": (32, "gelu", "adam")}


@pytest.mark.parametrize(("activation", "scales"), [("identity", {0.9}), ("tanh", {0.9, 1.0, 1.2})])
def test_a_linear_cell_is_drawn_where_it_has_an_equilibrium(activation, scales):
    initial = Initial(scales=[0.9, 1.0, 1.2], activations=[activation])
    assert {e.scale for e in dataclasses.replace(ONE, initial=initial).ensembles()} == scales


def test_the_first_seed_keeps_spectra():
    assert {run.seed for run in ONE.runs() if run.spectra} == {0}


def test_keys_follow_the_settings_and_are_the_same_in_any_process():
    config = Config("dense", 0.5)
    assert config.key != dataclasses.replace(config, seed=1).key
    code = "from fastdeq.study import Config; print(Config('dense', 0.5).key)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == config.key


def test_windows_of_a_text_are_part_of_a_key_and_a_folder_is_not():
    def keys(**options):
        study = Study(tasks=["characters"], seeds=1, **options)
        return {job.key for job in jobs_of(study) if job.part == "runs"}

    assert keys() == keys(mnist="/somewhere")
    assert not keys() & keys(characters=Characters(context=8))


def test_jobs_can_be_sent_to_other_processes():
    jobs = jobs_of(ONE)
    assert pickle.loads(pickle.dumps(jobs)) == jobs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["digit"]}, "Did you mean 'digits'"),
        ({"weights": ["dens"]}, "Did you mean 'dense'"),
        ({"regimes": ["keep"]}, "regimes"),
        ({"seeds": 0}, "seeds must be >= 1"),
        ({"tasks": ["mnist"]}, "needs mnist="),
        ({"images": Images(methods=["auto"])}, "methods"),
        ({"images": Images(scales=[0.0])}, "scale must be positive"),
        ({"images": Images(activations=["tan"])}, "Did you mean 'tanh'"),
        ({"initial": Initial(draws=0)}, "draws must be >= 1"),
        ({"initial": Initial(injection_variance=-1.0)}, "injection_variance must be positive"),
    ],
)
def test_settings_that_do_not_fit_are_said_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Study(**options)


# The command line


def test_every_setting_is_an_option_and_the_rest_keeps_its_value():
    study, options = study_from(
        ["--seeds", "7", "--images.epochs=2", "--images.scales", "[0.5, 2]", "--out", "here"]
    )
    images = dataclasses.replace(Images(), epochs=2, scales=[0.5, 2.0])
    assert study == dataclasses.replace(Study(), seeds=7, images=images)
    assert options.out == "here"


def test_quick_changes_the_defaults_and_nothing_else():
    assert study_from(["--quick"])[0] == quick()
    assert study_from(["--quick", "--seeds", "1"])[0] == dataclasses.replace(quick(), seeds=1)


def test_what_is_printed_can_be_read_again(capsys, tmp_path):
    given = ["--seeds", "3", "--tasks", "[digits]", "--images.max_gradient", "1.5"]
    with pytest.raises(SystemExit):
        study_from([*given, "--print_config"])
    path = tmp_path / "study.yaml"
    path.write_text(capsys.readouterr().out)
    assert study_from(["--config", str(path)])[0] == study_from(given)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3"], "seed"),
        (["--seeds", "many"], "seeds"),
        (["--tasks", "[digit]"], "digits"),
        (["--images.activations", "[tan]"], "tanh"),
        (["--images.scales", "[-1]"], "scale must be positive"),
        (["--config", "/nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_errors_of_the_command_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        study_from(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# Settings that mean the same, and settings given twice


@pytest.mark.parametrize("name", ["scale", "tol", "learning_rate", "momentum"])
def test_a_whole_number_is_the_same_setting_as_a_real_one(name):
    of_int, of_float = (Config(**{"weight": "dense", "scale": 0.5, name: v}) for v in _ONE[name])
    assert of_int.key == of_float.key
    assert of_int == of_float
    assert type(getattr(of_int, name)) is float


_ONE = {"scale": (1, 1.0), "tol": (1, 1.0), "learning_rate": (1, 1.0), "momentum": (0, 0.0)}


def test_whole_scales_make_the_same_jobs():
    def keys(whole):
        return {
            job.key
            for job in jobs_of(
                dataclasses.replace(
                    ONE,
                    images=dataclasses.replace(ONE.images, scales=[whole(1), whole(2)]),
                    initial=dataclasses.replace(
                        ONE.initial, scales=[whole(2)], activations=["tanh"]
                    ),
                )
            )
        }

    assert keys(int) == keys(float)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["digits", "digits"]}, "tasks lists 'digits' twice"),
        ({"regimes": ["kept", "kept"]}, "regimes lists 'kept' twice"),
        ({"images": Images(scales=[0.5, 1, 1.0])}, r"images.scales lists 1.0 twice"),
        ({"images": Images(methods=["auto/implicit"] * 2)}, "images.methods lists"),
        ({"characters": Characters(activations=["gelu", "gelu"])}, "characters.activations lists"),
        ({"initial": Initial(scales=[0.5, 0.5])}, "initial.scales lists"),
        ({"images": Images(tol=-1.0)}, "tol"),
        ({"images": Images(max_iter=0)}, "max_iter"),
        ({"characters": Characters(features=30)}, "multiple of 4"),
        ({"characters": Characters(windows=0)}, "windows"),
    ],
)
def test_what_would_fail_or_count_twice_in_every_run_is_said_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Study(**options)
