"""setup.py: what it tells torch, and what it records, with a stand-in for torch."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from paths import ROOT
from toolchain_cases import program, toolkit

# A torch that does nothing but answer, and says what it was told.
TORCH = {
    "__init__.py": """
from types import SimpleNamespace
__version__ = "2.99.0"
version = SimpleNamespace(cuda="13.2")
cuda = SimpleNamespace(device_count=lambda: 0)
""",
    "utils/__init__.py": "",
    "utils/cpp_extension.py": """
import json, os
from setuptools import Extension
from setuptools.command.build_ext import build_ext
CUDA_HOME = os.environ.get("CUDA_HOME")
def said(kind):
    def make(name, files, extra_compile_args, **more):
        names = ("CXX", "TORCH_CUDA_ARCH_LIST", "TORCH_NO_COMPILER_WRAPPER")
        told = {key: os.environ.get(key) for key in names}
        told |= {"kind": kind, "files": files, "flags": extra_compile_args, **more}
        print("TOLD" + json.dumps(told))
        return Extension(name, files)
    return make
CppExtension, CUDAExtension = said("cpp"), said("cuda")
class BuildExtension(build_ext):
    @classmethod
    def with_options(cls, **options): return cls
""",
}


@pytest.fixture
def checkout(tmp_path):
    """What setup.py needs, and the stand-in for torch."""
    for name, text in TORCH.items():
        path = tmp_path / "site" / "torch" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "fastdeq").mkdir()
    for name in ("setup.py", "fastdeq/constants.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def set_up(checkout, **environment):
    """What torch was told, and the record."""
    clean = {k: v for k, v in os.environ.items() if not re.match("CUDA_|TORCH_|FASTDEQ_|CXX", k)}
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "--name"],
        cwd=checkout,
        env={**clean, "PYTHONPATH": str(checkout.parent / "site"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("TOLD")]
    record = json.loads((checkout / "fastdeq" / "_build.json").read_text())
    return (told or [None])[0], record, done.stderr


pytest.importorskip("setuptools")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@needs_compiler
def test_setup_without_a_visible_gpu(checkout, tmp_path):
    told, record, _ = set_up(checkout, CUDA_HOME=toolkit(tmp_path / "cuda"))
    assert told["kind"] == "cuda"
    assert "csrc/cuda/persistent.cu" in told["files"]
    assert told["TORCH_CUDA_ARCH_LIST"] == record["architectures"] == "8.0;9.0+PTX"
    assert record["why_no_cuda"] == ""
    wanted = {"CUDA_HOME": str(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": "8.6"}
    assert set_up(checkout, **wanted)[0]["TORCH_CUDA_ARCH_LIST"] == "8.6"


@needs_compiler
def test_setup_with_another_cuda_leaves_its_sources_out(checkout, tmp_path):
    told, record, said = set_up(checkout, CUDA_HOME=toolkit(tmp_path / "cuda", "12.4"))
    assert told["kind"] == "cpp"
    assert not [name for name in told["files"] if name.endswith(".cu")]
    assert "-DFASTDEQ_WITH_CUDA=0" in told["flags"]["cxx"]
    assert "torch is built with CUDA 13.2" in record["why_no_cuda"]
    assert record["why_no_cuda"] in said
    assert record["torch"] == "2.99.0"


@needs_compiler
def test_setup_gives_torch_all_of_cxx(checkout, tmp_path):
    launcher = program(tmp_path / "ccache", 'exec "$@"')
    told, record, _ = set_up(checkout, CUDA_HOME="none", CXX=f"{launcher} c++ -DGIVEN=7")
    asked = [told["CXX"], "-dM", "-E", "-x", "c++", os.devnull]
    assert "#define GIVEN 7" in subprocess.check_output(asked, text=True)
    assert told["TORCH_NO_COMPILER_WRAPPER"] == "1"
    assert "no nvcc in none/bin" in record["why_no_cuda"]
    assert set_up(checkout, CUDA_HOME="none", CXX="c++")[0]["CXX"] == "c++"


def test_setup_without_an_extension_says_whether_on_purpose(checkout, tmp_path):
    for environment, on_purpose in (
        ({"FASTDEQ_NO_EXT": "1"}, True),
        ({"CXX": "nowhere g++"}, False),
    ):
        told, record, said = set_up(checkout, **environment)
        assert told is None
        assert record["on_purpose"] is on_purpose
        assert record["reason"] in said
