"""An extension that is not there, or does not load, is named once, at the first solve on a CPU."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
import torch
from layer_cases import Residual
from paths import ROOT

from fastdeq import AffineCell, DEQLayer, ExtensionWarning, fixed_point
from fastdeq.backends import extension

EXTENSION = f"_C{EXTENSION_SUFFIXES[0]}"
COMPILER = os.environ.get("CXX", "c++").split()

# Warnings are errors until the package is imported. The finders of an editable installation, which
# would find its extension for any copy of the package, are taken away.
PROGRAM = """
import importlib.metadata, json, sys, warnings
sys.meta_path = [f for f in sys.meta_path if getattr(f, "__name__", "") != "_EditableFinder"]
if not {others}:
    importlib.metadata.distributions = lambda **wanted: []
import torch
warnings.simplefilter("error")
import fastdeq
from fastdeq.backends.report import report
report("1")
torch.manual_seed(0)  # now and then random weights have no equilibrium, which warns as well
layer = fastdeq.DEQLayer(fastdeq.AffineCell(3, 5, scale=0.7))
seen = []
for _ in range(2):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(torch.randn(4, 3)).sum().backward()
    seen.append([(w.category.__name__, w.filename, str(w.message)) for w in caught])
print(json.dumps([fastdeq.__file__, seen]))
"""


def first_solves(folder, others=False, **environment):
    """The warnings of two training steps with the package in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(others=others)],
        cwd=folder,  # comes first on the path
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    file, seen = json.loads(done.stdout)
    assert file.startswith(str(folder)), file
    return seen


def message_of(seen):
    """The text of the one warning, which the first solve gave to the line that called the layer."""
    (first,), second = seen
    assert second == []
    assert first[:2] == ["ExtensionWarning", "<string>"]
    assert "python -m fastdeq info" in first[2]
    return first[2]


@pytest.fixture
def source(tmp_path):
    """A source folder with the package and without an extension."""
    folder = tmp_path / "source"
    left_out = shutil.ignore_patterns("_C*", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "fastdeq", folder / "fastdeq", ignore=left_out)
    return folder


def record(folder, **fields):
    (folder / "fastdeq" / "_build.json").write_text(json.dumps({"reason": "", **fields}))


def test_never_built(source):
    message = message_of(first_solves(source))
    assert f"there is none for this Python in {source / 'fastdeq'}" in message
    assert "pip install --no-build-isolation -e ." in message


def test_no_compiler_when_it_was_installed(source):
    record(source, reason="no C++ compiler ('c++') was found", on_purpose=False)
    message = message_of(first_solves(source))
    assert "no C++ compiler ('c++') was found. Name GCC or Clang in CXX" in message
    assert "--force-reinstall" in message


def test_left_out_on_purpose_is_silent(source):
    record(source, reason="it was left out by FASTDEQ_NO_EXT", on_purpose=True)
    assert first_solves(source) == [[], []]


def undefined_symbol(path):
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("no C++ compiler")
    code = path.with_suffix(".cpp")
    code.write_text('extern "C" void* not_in_torch(); extern "C" void* PyInit__C();\n')
    code.write_text(code.read_text() + "void* PyInit__C() { return not_in_torch(); }\n")
    subprocess.run([*COMPILER, "-shared", "-fPIC", "-o", path, code], check=True, timeout=60)


def no_library(path):
    path.write_bytes(b"\x7fELF, and no more")


@pytest.mark.parametrize(
    ("write", "reason"),
    [(undefined_symbol, "undefined symbol: not_in_torch"), (no_library, EXTENSION)],
)
def test_extension_for_another_torch(source, write, reason):
    write(source / "fastdeq" / EXTENSION)
    record(source, torch="2.99.0+cu130", on_purpose=False)
    message = message_of(first_solves(source))
    assert "it failed to load" in message
    assert reason in message
    assert f"built against torch 2.99.0+cu130, and this is {torch.__version__}" in message
    assert "--force-reinstall" in message


@pytest.mark.parametrize("on_purpose", [False, True])
def test_source_folder_before_an_installation(source, tmp_path, on_purpose):
    """Whatever the source folder was last built for: the installation has an extension."""
    installed = tmp_path / "site" / "fastdeq"
    installed.mkdir(parents=True)
    (installed / EXTENSION).touch()
    metadata = installed.with_name("fastdeq-0.1.0.dist-info") / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: fastdeq\nVersion: 0.1.0\n")
    record(source, reason="it was left out" if on_purpose else "", on_purpose=on_purpose)
    message = message_of(first_solves(source, others=True, PYTHONPATH=str(installed.parent)))
    assert f"hides the fastdeq that is installed in {installed}: start Python in another" in message


@pytest.fixture
def missing(monkeypatch):
    """As if the extension had not been found, for the choice of an engine and the warning."""
    monkeypatch.setattr(extension, "why_missing", "it was not built")
    monkeypatch.setattr(extension, "_silent", False)


def solve(kind, **options):
    x = torch.randn(4, 3)
    if kind == "affine":
        return DEQLayer(AffineCell(3, 5, scale=0.7), **options)(x)
    if kind == "general":
        return DEQLayer(Residual(), **options)(torch.randn(4, 6))
    return fixed_point(lambda z: 0.5 * torch.tanh(z) + x, torch.zeros(4, 3), **options)[0]


KINDS = ["affine", "general", "functional"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_solve_warns_once(missing, kind):
    with pytest.warns(ExtensionWarning, match="is missing: it was not built") as caught:
        solve(kind)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_pytorch_on_request_is_silent(missing, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExtensionWarning)
        solve(kind, backend="reference")


def test_as_an_error_it_stops_every_solve(missing):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExtensionWarning)
        for _ in range(2):
            with pytest.raises(ExtensionWarning):
                solve("affine")


def test_not_while_a_compiler_traces(missing, fresh_compiler):
    layer = DEQLayer(AffineCell(3, 5, scale=0.7))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExtensionWarning)
        torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(4, 3))
    with pytest.warns(ExtensionWarning):
        solve("affine")
