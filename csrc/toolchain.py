"""The compilers that setup.py builds the extension with: what they are, and what they are told.

Needs the standard library alone; what torch says comes as arguments.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

#: Where no GPU is visible: the two that the kernels are tuned for. PTX serves later ones.
ARCHITECTURES = "8.0;9.0+PTX"


def output_of(command: list[str]) -> str:
    """Both output streams of a command; empty where it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return "" if done.returncode else done.stdout + done.stderr


def compiler_command(environ: Mapping[str, str]) -> list[str]:
    """The words of ``CXX``, which may hold launchers and flags: ``ccache g++ -march=x86-64-v3``."""
    return shlex.split(environ.get("CXX", "")) or ["cl" if sys.platform == "win32" else "c++"]


def why_no_compiler(command: list[str]) -> str:
    """Why the C++ engine cannot be built with ``command``; empty where it can be tried."""
    if any(Path(word).stem.lower() == "cl" for word in command):
        return "the CPU engine needs GCC or Clang (set CXX)"
    if not output_of([*command, "--version"]):
        return f"no C++ compiler ({shlex.join(command)!r}) was found when fastdeq was installed"
    return ""


def as_one_word(command: list[str], folder: Path) -> str:
    """``command`` as a program without arguments, which is all that torch takes from ``CXX``: it
    quotes the whole of it for ninja. Its name depends on its content, because what was compiled
    with another command must be compiled anew."""
    if len(command) == 1:
        return command[0]
    script = f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n'
    path = folder / f"c++-{hashlib.sha256(script.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
    return str(path)


def openmp_flags(command: list[str]) -> list[str]:
    """at::parallel_for is serial without OpenMP. Only the compiler is told, not the linker: the
    runtime is the one that torch brings, whose thread count torch.set_num_threads sets. That is
    GCC's, so another compiler's calls would not be found in it."""
    if not sys.platform.startswith("linux"):
        return []
    return ["-fopenmp"] if "Free Software Foundation" in output_of([*command, "--version"]) else []


def size_flags(environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """For the compiler and the linker: no debugging information and no symbols but the exported
    ones, which are nine tenths of the file, unless CFLAGS or CXXFLAGS asks for them with ``-g``."""
    words = shlex.split(environ.get("CFLAGS", "") + " " + environ.get("CXXFLAGS", ""))
    if any(re.match(r"-g($|[1-3]|gdb|dwarf)", word) for word in words):
        return [], []
    return ["-g0"], ["-Wl,-s"] if sys.platform.startswith("linux") else []


def cpu_targets(command: list[str], wanted: str) -> list[str]:
    """The instruction sets of x86-64 to compile the CPU engine for, next to the generic one.

    Raises:
        ValueError: ``wanted``, from FASTDEQ_ARCH, is neither "native" nor "portable".
    """
    if wanted not in ("native", "portable"):
        raise ValueError(f"FASTDEQ_ARCH={wanted!r} is not known; use 'native' or 'portable'")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    if wanted == "portable":
        return ["avx512", "avx2"]
    # What -march=native turns on here; the last -march of a command line is the one that counts.
    asked = [*command, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    macros = output_of(asked).split()
    if {"__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__"} <= set(macros):
        return ["avx512"]
    return ["avx2"] if {"__AVX2__", "__FMA__"} <= set(macros) else []


def _has_headers(home: str) -> bool:
    headers = "include/cuda_runtime.h"
    return bool([*Path(home).glob(headers), *Path(home).glob(f"targets/*/{headers}")])


def toolkit_of_nvcc() -> str | None:
    """The folder of the CUDA toolkit that the ``nvcc`` on the PATH is of: the one that it is in, as
    torch takes it, if it has headers; for a link or a script, the one that nvcc names."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = output_of([nvcc, "--dryrun", "-x", "cu", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    homes = [os.path.dirname(os.path.dirname(path)) for path in (nvcc, os.path.realpath(nvcc))]
    homes += [os.path.realpath(top[1])] if top else []
    return next((home for home in homes if _has_headers(home)), None)


def why_no_cuda(torch_cuda: str | None, home: str | None) -> str:
    """Why the CUDA sources are to be left out; empty where they can be compiled.

    Args:
        torch_cuda: the version of CUDA that torch is built with, None where it has none.
        home: the folder of the CUDA toolkit, None where there is none.
    """
    if torch_cuda is None:
        return "this torch is built without CUDA"
    if home is None:
        return "nvcc was not found when fastdeq was installed (set CUDA_HOME to its toolkit)"
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc is None:
        return f"there was no nvcc in {home}/bin when fastdeq was installed"
    release = re.search(r"release (\d+)\.(\d+)", output_of([nvcc, "--version"]))
    if release is None:
        return f"{nvcc} did not run when fastdeq was installed"
    if release[1] != torch_cuda.split(".")[0]:  # as torch does: other minor versions will do
        return f"torch is built with CUDA {torch_cuda}, and {nvcc} is {'.'.join(release.groups())}"
    if not _has_headers(home):
        return f"there were no CUDA headers in {home} when fastdeq was installed (set CUDA_HOME)"
    return ""


def cuda_architectures(requested: str | None, devices: int) -> str | None:
    """TORCH_CUDA_ARCH_LIST for the build, None where torch is to take the GPUs that it sees.

    Args:
        requested: what the variable says now.
        devices: how many GPUs torch sees; without any it would fail.
    """
    if requested and requested != "native":
        return requested
    return None if devices else ARCHITECTURES
