"""``python -m fastdeq info``, and the package without its extension."""

import subprocess
import sys

import pytest
import torch

import fastdeq
from fastdeq.backends import extension, report
from fastdeq.backends.choose import check_device


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_info_says_what_is_true_here():
    done = run("-m", "fastdeq", "info")
    assert done.returncode == 0, done.stderr
    lines = {line[:18].strip(): line[19:] for line in done.stdout.splitlines() if line}
    assert lines["fastdeq"] == fastdeq.__version__
    assert lines["torch"] == torch.__version__
    assert ("loaded" in lines["extension"]) == (extension.module is not None)
    assert ("unavailable" in lines['backend="cpp"']) == (extension.module is None)
    if not torch.cuda.is_available():
        assert lines["GPU"].startswith("none")
        assert "unavailable" in lines['backend="triton"']
        assert "unavailable" in lines['backend="cuda"']
    row = next(line for line in done.stdout.splitlines() if line.startswith("anderson_mix"))
    assert row.split()[1] == ("cpp" if extension.module else "reference")


def test_unknown_command_lists_the_known_ones():
    done = run("-m", "fastdeq", "inform")
    assert done.returncode == 2
    assert "info" in done.stderr


def test_a_shape_has_its_own_report_and_its_options_need_it():
    done = run("-m", "fastdeq", "info", "--size", "64", "--device", "cpu", "--batch", "8")
    assert done.returncode == 0, done.stderr
    assert "forward:" in done.stdout
    for wrong in (["--weight", "symmetric"], ["--batch", "8"], ["--size", "0"]):
        done = run("-m", "fastdeq", "info", *wrong)
        assert done.returncode == 2
        assert "--size" in done.stderr


WITHOUT_EXTENSION = """
import sys
sys.modules["fastdeq._C"] = None
import torch, fastdeq
from fastdeq.backends.report import report
assert "missing" in report("1"), report("1")
torch.manual_seed(0)
layer = fastdeq.DEQLayer(fastdeq.AffineCell(4, 6, scale=0.8), solver="anderson")
layer(torch.randn(3, 4)).sum().backward()
assert layer.last_solution.converged.all()
try:
    fastdeq.DEQLayer(layer.cell, backend="cpp")(torch.randn(3, 4))
except fastdeq.BackendError as error:
    assert "extension is missing" in str(error), error
    print("calm")
"""


def test_package_works_without_its_extension():
    done = run("-c", WITHOUT_EXTENSION)
    assert done.stdout.strip() == "calm", done.stderr


def test_import_pulls_in_nothing_optional():
    code = (
        "import sys, fastdeq; bad = {'triton', 'sklearn', 'matplotlib', 'rich', 'torchdeq', "
        "'fastdeq.study'} & set(sys.modules); print(sorted(bad))"
    )
    before = run("-c", "import sys, torch; print(sorted({'triton', 'rich'} & set(sys.modules)))")
    assert run("-c", code).stdout == before.stdout


def test_report_names_the_mismatch_of_versions(monkeypatch):
    monkeypatch.setattr(extension, "module", object())
    built = {"compiler": "gcc", "torch": "2.99.0", "cuda": "no"}
    monkeypatch.setattr(extension, "build_info", built)
    assert "built against torch 2.99.0 but running" in report.report("1")


def line_of(name):
    (line,) = [line for line in report.report("1").splitlines() if line.startswith(name)]
    return line.removeprefix(name).strip()


def test_report_says_why_there_are_no_cuda_sources(monkeypatch):
    monkeypatch.setattr(extension, "module", object())
    monkeypatch.setattr(extension, "has_cuda", False)
    monkeypatch.setattr(extension, "build_info", {"compiler": "gcc", "torch": torch.__version__})
    reason = "torch is built with CUDA 13.2, and /opt/cuda/bin/nvcc is 12.4"
    monkeypatch.setattr(extension, "build_record", {"why_no_cuda": reason})
    assert line_of("CUDA sources") == f"left out: {reason}"
    assert reason in line_of('backend="cuda"')
    with pytest.raises(fastdeq.BackendError, match="is built with CUDA"):
        check_device("cuda", "cuda")


def test_report_says_what_the_cuda_sources_are_for(monkeypatch):
    monkeypatch.setattr(extension, "has_cuda", True)
    monkeypatch.setattr(extension, "build_record", {"architectures": "8.0;9.0+PTX"})
    assert line_of("CUDA sources") == "compiled in, for 8.0;9.0+PTX"
