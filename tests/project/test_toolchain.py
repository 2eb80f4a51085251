"""What setup.py asks of compilers, and what it decides: with programs that only answer."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from paths import ROOT
from toolchain_cases import program, toolkit

spec = spec_from_file_location("toolchain", ROOT / "csrc" / "toolchain.py")
toolchain = module_from_spec(spec)
spec.loader.exec_module(toolchain)


@pytest.fixture
def echo(tmp_path):
    """A launcher that prints its arguments, one in each line."""
    return str(program(tmp_path / "bin" / "echo arguments", 'printf "%s\\n" "$@"'))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("ccache g++ -march=x86-64-v3", ["ccache", "g++", "-march=x86-64-v3"]),
        ("'/opt/my tools/clang++' -stdlib=libc++", ["/opt/my tools/clang++", "-stdlib=libc++"]),
        ("g++-13", ["g++-13"]),
        ("", ["c++"]),
    ],
)
def test_words_of_cxx(value, words):
    assert toolchain.compiler_command({"CXX": value}) == words
    assert toolchain.compiler_command({}) == ["c++"]


def test_flags_and_launchers_become_one_word(tmp_path, echo):
    folder = tmp_path / "build"
    one = toolchain.as_one_word([echo, "g++", "-DA=b c", "-march=x86-64-v3"], folder)
    done = subprocess.run([one, "-c", "a b.cpp"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["g++", "-DA=b c", "-march=x86-64-v3", "-c", "a b.cpp"]
    # ninja compiles anew what was compiled by another name.
    assert toolchain.as_one_word([echo, "g++", "-DA=b c", "-march=x86-64-v4"], folder) != one
    assert toolchain.as_one_word(["g++"], folder) == "g++"


def test_compilers_that_do_not_run_are_named(tmp_path, echo):
    assert toolchain.why_no_compiler([echo, "g++"]) == ""
    failing = str(program(tmp_path / "failing", "echo no such compiler; exit 1"))
    for command in ([failing, "g++"], [str(tmp_path / "nothing")]):
        assert repr(command[0])[1:-1] in toolchain.why_no_compiler(command)
    assert "GCC or Clang" in toolchain.why_no_compiler(["sccache", "cl.exe"])


def test_openmp_is_for_gcc_behind_a_launcher_too(tmp_path):
    gcc = program(tmp_path / "g++", 'echo "Copyright (C) 2022 Free Software Foundation, Inc."')
    clang = program(tmp_path / "clang++", 'echo "Debian clang version 14.0.6"')
    launcher = str(program(tmp_path / "ccache", 'exec "$@"'))
    expected = ["-fopenmp"] if sys.platform.startswith("linux") else []
    assert toolchain.openmp_flags([launcher, str(gcc), "-pipe"]) == expected
    assert toolchain.openmp_flags([launcher, str(clang), "-stdlib=libc++"]) == []


def test_cpu_targets_of_a_command(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "x86_64")
    launcher = str(program(tmp_path / "ccache", 'exec "$@"'))
    machine = {
        "avx512": "__AVX2__ __FMA__ __AVX512F__ __AVX512BW__ __AVX512DQ__ __AVX512VL__",
        "avx2": "__AVX2__ __FMA__",
        "": "__SSE2__",
    }
    for target, macros in machine.items():
        # It has these with -march=native, given after any other.
        last = f'for word; do case $word in -march=*) arch=$word;; esac; done; m="{macros}"'
        shown = '[ "$arch" = -march=native ] && for w in $m; do echo "#define $w 1"; done'
        compiler = str(program(tmp_path / "g++", f"{last}; {shown}"))
        found = toolchain.cpu_targets([launcher, compiler, "-march=x86-64-v2"], "native")
        assert found == ([target] if target else [])
        assert toolchain.cpu_targets([compiler], "portable") == ["avx512", "avx2"]
    with pytest.raises(ValueError, match="'native' or 'portable'"):
        toolchain.cpu_targets([compiler], "fast")
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "aarch64")
    assert toolchain.cpu_targets([compiler], "portable") == []


def test_debugging_information_is_for_who_asks(tmp_path):
    assert toolchain.size_flags({"CFLAGS": "-O2 -g0", "CXXFLAGS": "-funroll-loops"})[0] == ["-g0"]
    for flag in ("-g", "-g3", "-ggdb3", "-gdwarf-5"):
        assert toolchain.size_flags({"CXXFLAGS": f"-O1 {flag}"}) == ([], [])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sizes are those of ELF files")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_stripped_libraries_keep_what_they_export(tmp_path):
    code = tmp_path / "library.cpp"
    code.write_text('#include <map>\nextern "C" int exported() { std::map<int, int> m{{1, 2}}; ')
    code.write_text(code.read_text() + "return m[1]; }\n")
    compile_flags, link_flags = toolchain.size_flags({})
    sizes = {}
    for name, compiled, linked in (("debug", [], []), ("small", compile_flags, link_flags)):
        library = tmp_path / f"{name}.so"
        command = ["c++", "-g", "-shared", "-fPIC", *compiled, str(code), "-o", str(library)]
        subprocess.run([*command, *linked], check=True, timeout=60)
        sizes[name] = library.stat().st_size
        assert b"exported" in library.read_bytes()
    assert sizes["small"] < 0.5 * sizes["debug"]


def test_cuda_sources_need_a_toolkit_of_the_same_major_version(tmp_path):
    cuda13 = toolkit(tmp_path / "cuda-13.0")
    conda = toolkit(tmp_path / "conda", "12.8", "targets/x86_64-linux/include")
    assert toolchain.why_no_cuda("13.0", cuda13) == ""
    assert toolchain.why_no_cuda("13.2", cuda13) == ""
    assert toolchain.why_no_cuda("12.6", conda) == ""
    for torch_cuda, home in (("12.8", cuda13), ("13.0", conda)):
        reason = toolchain.why_no_cuda(torch_cuda, home)
        assert f"torch is built with CUDA {torch_cuda}, and {home}/bin/nvcc is 1" in reason


def test_what_is_no_toolkit_says_so(tmp_path):
    runtime = tmp_path / "cuda"
    (runtime / "lib64").mkdir(parents=True)
    broken = toolkit(tmp_path / "broken", nvcc="echo release 13.0; exit 127")
    bare = toolkit(tmp_path / "bare")
    shutil.rmtree(f"{bare}/include")
    for home, reason in (
        (None, "nvcc was not found"),
        (str(runtime), f"no nvcc in {runtime}/bin"),
        (broken, "did not run"),
        (bare, f"no CUDA headers in {bare}"),
    ):
        assert reason in toolchain.why_no_cuda("13.0", home)
    assert toolchain.why_no_cuda(None, bare) == "this torch is built without CUDA"


def test_toolkit_behind_a_script_on_the_path(tmp_path, monkeypatch):
    home = tmp_path / "cuda-13.0"
    script = 'echo \'#$ _HERE_=x\' >&2; echo "#$ TOP=$(dirname "$0")/.." >&2'
    toolkit(home, nvcc=script)
    program(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert toolchain.toolkit_of_nvcc() == os.path.realpath(home)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "nvcc").symlink_to(home / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'link'}:{os.environ['PATH']}")
    assert toolchain.toolkit_of_nvcc() == str(home)
    # The distribution's own, whose headers are not where it says.
    usr = toolkit(tmp_path / "usr", nvcc=f"echo '#$ TOP={tmp_path}/lib' >&2")
    monkeypatch.setenv("PATH", f"{usr}/bin:{os.environ['PATH']}")
    assert toolchain.toolkit_of_nvcc() == usr
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    program(tmp_path / "bin" / "nvcc", "echo '#$ PATH=elsewhere' >&2")
    assert toolchain.toolkit_of_nvcc() is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_toolkit_of_the_nvcc_here():
    home = toolchain.toolkit_of_nvcc()
    release = re.search(
        r"release (\d+\.\d+)", toolchain.output_of([f"{home}/bin/nvcc", "--version"])
    )
    assert toolchain.why_no_cuda(release[1], home) == ""


def test_architectures():
    for requested in (None, "", "native"):
        assert toolchain.cuda_architectures(requested, devices=0) == "8.0;9.0+PTX"
        assert toolchain.cuda_architectures(requested, devices=2) is None
    assert toolchain.cuda_architectures("8.6", devices=0) == "8.6"
