"""Names, signatures and the command line of ``fastdeq.compat.torchdeq``, next to torchdeq's own."""

import argparse
import importlib
import inspect

import pytest

import fastdeq.compat.torchdeq as ours

theirs = pytest.importorskip("torchdeq")
MODULES = (
    "core",
    "dropout",
    "grad",
    "loss",
    "loss.correction",
    "loss.jacobian",
    "norm",
    "norm.base_norm",
    "norm.spectral_norm",
    "norm.weight_norm",
    "solver",
    "solver.anderson",
    "solver.broyden",
    "solver.fp_iter",
    "solver.stat",
    "solver.utils",
    "utils",
    "utils.arg_utils",
    "utils.config",
    "utils.init",
    "utils.layer_utils",
    "utils.mem",
)
# Pieces of torchdeq's implementation that are not for its users.
PRIVATE = {
    "DEQGradCkpt",
    "DEQWrapper",
    "MDEQWrapper",
    "SpeedyMDEQWrapper",
    "filter_input",
    "filter_out",
    "line_search",
    "matvec",
    "reset_grad",
    "rmatvec",
    "scalar_search_armijo",
}


def own_names(module):
    """Functions and classes of a module, and all those of torchdeq that a package collects."""
    for name, value in vars(module).items():
        home = getattr(value, "__module__", None) or ""
        collected = hasattr(module, "__path__") and home.startswith("torchdeq.")
        if not name.startswith("_") and callable(value) and (collected or home == module.__name__):
            yield name


@pytest.mark.parametrize("module", ["", *MODULES])
def test_every_public_name_is_there(module):
    path = f".{module}" if module else ""
    there = importlib.import_module(f"torchdeq{path}")
    here = importlib.import_module(f"fastdeq.compat.torchdeq{path}")
    names = set(own_names(there)) - PRIVATE
    assert names
    assert not names - set(dir(here))


def options_of(function):
    return {
        name: p.default
        for name, p in inspect.signature(function).parameters.items()
        if p.kind is p.POSITIONAL_OR_KEYWORD and name != "self"
    }


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("core.DEQBase", {}),
        ("core.DEQIndexing", {}),
        ("core.DEQSliced", {}),
        ("core.get_deq", {}),
        ("core.DEQIndexing.forward", {}),
        ("grad.backward_factory", {"b_solver_kwargs": None}),
        ("solver.get_solver", {}),
        ("solver.register_solver", {}),
        ("solver.anderson.anderson_solver", {"lam": None}),
        ("solver.broyden.broyden_solver", {}),
        ("solver.fp_iter.fixed_point_iter", {}),
        ("solver.fp_iter.simple_fixed_point_iter", {}),
        ("solver.utils.update_state", {}),
        ("solver.utils.init_solver_info", {}),
        ("norm.apply_norm", {}),
        ("norm.reset_norm", {}),
        ("norm.remove_norm", {}),
        ("norm.register_norm", {}),
        ("norm.register_norm_module", {}),
        ("loss.fp_correction", {}),
        ("loss.jac_reg", {}),
        ("loss.power_method", {}),
        ("loss.register_weight_func", {}),
        ("utils.mixed_init", {}),
        ("utils.mem_gc", {}),
        ("dropout.VariationalDropout", {}),
        ("dropout.VariationalDropout2d", {}),
        ("dropout.VariationalDropToken1d", {}),
        ("dropout.reset_dropout", {}),
    ],
)
def test_arguments_and_defaults_are_the_same(name, differs):
    def of(package):
        found = importlib.import_module(package)
        for part in name.split("."):
            try:
                found = getattr(found, part)
            except AttributeError:
                found = importlib.import_module(f"{found.__name__}.{part}")
        return options_of(found)

    assert of("fastdeq.compat.torchdeq") == {**of("torchdeq"), **differs}


def arguments(package):
    parser = argparse.ArgumentParser()
    package.add_deq_args(parser)
    seen = {
        a.option_strings[0]: (a.dest, a.type, a.nargs, a.default, a.const) for a in parser._actions
    }
    return parser, seen


def test_the_command_line_is_the_same():
    assert arguments(ours)[1] == arguments(theirs)[1]
    given = "--f_solver anderson --grad 2 3 --indexing 5 --ift --norm_clip --f_tol 0.01 --tau 0.5"
    found = [vars(arguments(package)[0].parse_args(given.split())) for package in (ours, theirs)]
    assert found[0] == found[1]


def test_a_namespace_may_hold_other_names_and_stays_as_it_is():
    args = arguments(ours)[0].parse_args(["--core", "indexing", "--f_max_iter", "7"])
    args.dataset = "images"
    before = dict(vars(args))
    deq = ours.get_deq(args, grad=[2], f_tol=1e-2)
    assert isinstance(deq, ours.DEQIndexing)
    assert (deq.f_max_iter, deq.f_tol, deq.indexing) == (7, 1e-2, [7])
    assert vars(args) == before
    assert ours.get_deq({"f_max_iter": 3, "seed": 0}).f_max_iter == 3


@pytest.mark.parametrize(
    ("build", "error", "named"),
    [
        (lambda: ours.get_deq(stop_mode="rel"), TypeError, "f_stop_mode"),
        (lambda: ours.DEQSliced(f_solvr="anderson"), TypeError, "'f_solver'"),
        (lambda: ours.get_deq(f_stop_mode="relative"), ValueError, "'rel'"),
        (lambda: ours.get_deq(f_solver="andersen"), ValueError, "'anderson'"),
        (lambda: ours.get_deq(core="slice"), ValueError, "'sliced'"),
        (lambda: ours.get_deq(grad=0), ValueError, "1 or more"),
        (lambda: ours.get_deq(grad=[1, 2]), ValueError, "2 numbers of steps"),
        (lambda: ours.get_solver("anderson")(lambda z: z, None, lamda=1), TypeError, "lam"),
        (lambda: ours.apply_norm(None, "weightnorm"), ValueError, "'weight_norm'"),
        (lambda: ours.fp_correction(min, ([1],), gama=1), TypeError, "gamma"),
        (lambda: ours.fp_correction(min, ([1],), "expo"), ValueError, "'exp'"),
        (lambda: ours.get_deq()(lambda z: z, None), TypeError, "start must be a tensor"),
        (lambda: ours.get_deq()(min, None, sradius=True), TypeError, "sradius_mode"),
        (lambda: ours.get_deq()(min, None, solver_kwargs={"n": 1}), TypeError, "f_max_iter"),
    ],
)
def test_what_is_misspelt_raises_with_the_valid_names(build, error, named):
    with pytest.raises(error, match=named):
        build()
