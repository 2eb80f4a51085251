"""The rooms of the code: imports point down the list only, and a number stands in one place."""

import ast
import re
import runpy

import pytest
from native_options import PYTHON_ALONE
from paths import ROOT

from fastdeq import constants
from fastdeq.backends import extension
from fastdeq.solution import Status
from fastdeq.solvers.solve_options import FIELDS

PACKAGE = "fastdeq"  # its own names, those of fastdeq/__init__.py
# From top to bottom. A room imports from itself and from the rooms below it.
ROOMS = (
    "__main__",
    PACKAGE,
    "study",
    "compat",
    "diagnostics",
    "trajectory",
    "layer",
    "functional",
    "solve",
    "options",
    "gradients",
    "cells",
    "init",
    "weights",
    "ops",
    "backends",
    "kernels",
    "solvers",
    "failure",
    "diagnosis",
    "solution",
    "samples",
    "estimate",
    "theory",
    "activations",
    "conventions",
    "cuda_stream",
    "errors",
    "constants",
)


def modules():
    """(room, file) of every module but fastdeq/__init__.py."""
    for folder, prefix in ((ROOT / "fastdeq", ()), (ROOT / "kernels", ("kernels",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            if parts != ("__init__",):
                yield parts, path


def imported(parts, source):
    """The rooms that a module imports from, at its top or within a function."""
    package = parts if parts[-1] == "__init__" else parts[:-1]
    package = package[:-1] if package and package[-1] == "__init__" else package
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            names = [name[1:] for name in names if name[0] == PACKAGE]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                up = list(package[: len(package) - (node.level - 1)])
                names = [[*up, *base, alias.name] for alias in node.names]
            elif base[:1] == [PACKAGE]:
                names = [[*base[1:], alias.name] for alias in node.names]
        # What is no room is a name of the package itself, but for the compiled extension.
        rooms = (name[0] if name and name[0] in ROOMS else PACKAGE for name in names)
        yield from (room for room, name in zip(rooms, names, strict=True) if name[:1] != ["_C"])


def upward(parts, source):
    below = ROOMS.index(parts[0])
    return sorted({room for room in imported(parts, source) if ROOMS.index(room) < below})


def test_every_module_is_in_a_room():
    assert {PACKAGE, *(parts[0] for parts, _ in modules())} == set(ROOMS)


@pytest.mark.parametrize(("parts", "path"), list(modules()), ids=lambda x: str(x)[-40:])
def test_imports_point_down(parts, path):
    assert upward(parts, path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from ..layer import DEQLayer",
        "from ..solve.packing import Packing",
        "import fastdeq.ops",
        "def f():\n    from .. import cells",
        "from fastdeq.options import Options",
        "from .. import DEQLayer",
        "from fastdeq import fixed_point",
        "import fastdeq",
    ],
)
def test_an_import_that_points_up_is_seen(line):
    assert upward(("solvers", "picard"), line)
    assert not upward(
        ("solvers", "picard"),
        "from ..errors import check_choice\nfrom . import base\nfrom .. import _C",
    )


INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


def test_csrc_shares_through_common_alone():
    """csrc/cpu and csrc/cuda know csrc/common and themselves; common knows neither."""
    allowed = {"cpu": {"cpu", "common"}, "cuda": {"cuda", "common"}, "common": {"common"}}
    csrc, seen = ROOT / "csrc", 0
    for room, rooms in allowed.items():
        for path in (csrc / room).iterdir():
            for name in INCLUDE.findall(path.read_text()):
                target = next(p for p in (path.parent / name, csrc / name) if p.is_file())
                assert target.resolve().relative_to(csrc).parts[0] in rooms, (path.name, name)
                seen += 1
    assert seen > 20


def numbers():
    return {name: value for name, value in vars(constants).items() if name.isupper()}


def test_the_generated_header_is_up_to_date():
    generator = runpy.run_path(str(ROOT / "csrc" / "generate_constants.py"))
    assert generator["constants"]() == numbers()
    assert generator["header"]() == (ROOT / "csrc" / "common" / "constants.h").read_text()


def test_the_statuses_are_named_in_their_order():
    """Where a status is a number, as in C++ and Triton, its name is that of the constant."""
    names = [name.removeprefix("STATUS_") for name in numbers() if name.startswith("STATUS_")]
    assert names == [status.name for status in Status]
    assert [status.value for status in Status] == list(range(len(Status)))


@pytest.mark.skipif(extension.module is None, reason="no extension here")
def test_the_extension_was_built_with_these_numbers():
    assert extension.module.constants() == numbers()


def test_the_triton_kernels_have_these_numbers():
    """A compile-time constant with the name of one of them has its value."""
    pytest.importorskip("triton")
    import importlib

    from triton.language import constexpr

    seen = set()
    for parts, path in modules():
        if parts[0] != "kernels" or path.name == "__init__.py":
            continue
        module = importlib.import_module("fastdeq." + ".".join(parts))
        for name, value in vars(module).items():
            known = name.lstrip("_")
            if isinstance(value, constexpr) and known in numbers():
                assert value.value == numbers()[known], (path.name, name)
                seen.add(known)
    assert len(seen) > 10


def test_every_option_is_read_from_the_argument_of_its_name():
    """But those which no compiled engine has a use for."""
    source = (ROOT / "csrc" / "common" / "boxed_arguments.h").read_text()
    read = re.findall(r'o\.(\w+) = (?:known_\w+\()?arguments\.\w+\("(\w+)"', source)
    assert read == [(name, name) for name in FIELDS if name not in PYTHON_ALONE]
