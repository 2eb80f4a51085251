"""Builds the one extension ``fastdeq._C``. Everything else about the package is in pyproject.toml.

FASTDEQ_NO_EXT=1         install without it; plain PyTorch does every operation
FASTDEQ_ARCH=native      (default) the CPU engine for this machine, and one for any other
FASTDEQ_ARCH=portable    engines for AVX-512, AVX2 and any other, chosen when fastdeq is loaded
CUDA sources join when torch has CUDA and nvcc is found.

What was built, or why not, goes into ``fastdeq/_build.json`` for ``python -m fastdeq info``.
"""

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
COMPILER = os.environ.get("CXX", "cl" if sys.platform == "win32" else "c++").split()
HOW = "Install torch first and use --no-build-isolation, or set FASTDEQ_NO_EXT=1."


def reason_to_skip() -> str:
    if os.environ.get("FASTDEQ_NO_EXT", "0") not in ("", "0"):
        return "it was left out by FASTDEQ_NO_EXT"
    if shutil.which(COMPILER[0]) is None:
        return f"no C++ compiler ({COMPILER[0]!r}) was found when fastdeq was installed"
    if Path(COMPILER[0]).stem.lower() == "cl":
        return "the CPU engine needs GCC or Clang (set CXX)"
    return ""


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc" / folder).glob(suffix))


def openmp_flags() -> list[str]:
    """at::parallel_for is serial without OpenMP. Only the compiler is told, not the linker: the
    runtime is the one that torch brings, whose thread count torch.set_num_threads sets. That is
    GCC's, so another compiler's calls would not be found in it."""
    if not sys.platform.startswith("linux"):
        return []
    version = subprocess.run([*COMPILER, "--version"], capture_output=True, text=True, check=False)
    return ["-fopenmp"] if "Free Software Foundation" in version.stdout else []


def cpu_targets() -> list[str]:
    """The instruction sets of x86-64 to compile the CPU engine for, next to the generic one."""
    arch = os.environ.get("FASTDEQ_ARCH", "native")
    if arch not in ("native", "portable"):
        sys.exit(f"fastdeq: FASTDEQ_ARCH={arch!r} is not known; use 'native' or 'portable'.")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    if arch == "portable":
        return ["avx512", "avx2"]
    # What the compiler's -march=native would turn on here.
    asked = [*COMPILER, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    if {"__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__"} <= set(macros):
        return ["avx512"]
    return ["avx2"] if {"__AVX2__", "__FMA__"} <= set(macros) else []


def extension_arguments() -> dict:
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        sys.exit(f"fastdeq: torch is not importable in the build environment ({error}). {HOW}")

    runpy.run_path(str(ROOT / "csrc" / "generate_constants.py"))["write"]()
    cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    targets = cpu_targets()
    left_out = {f"csrc/cpu/target_{t}.cpp" for t in ("avx512", "avx2") if t not in targets}
    files = sources("", "*.cpp") + [f for f in sources("cpu", "*.cpp") if f not in left_out]
    defines = [f"-DFASTDEQ_WITH_CUDA={int(cuda)}", *(f"-DFASTDEQ_HAS_{t.upper()}" for t in targets)]
    flags = {"cxx": ["-O3", "-std=c++20", "-Wall", *defines, *openmp_flags()]}
    make = cpp_extension.CppExtension
    if cuda:
        make = cpp_extension.CUDAExtension
        files += sources("cuda", "*.cu")
        flags["nvcc"] = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]
    extension = make(
        "fastdeq._C", files, include_dirs=[str(ROOT / "csrc")], extra_compile_args=flags
    )
    # A failed compilation stops the installation: a slower package must be asked for.
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    }


skipped = reason_to_skip()
if skipped:
    print(f"fastdeq: installing without the compiled extension: {skipped}.", file=sys.stderr)
(ROOT / "fastdeq" / "_build.json").write_text(json.dumps({"reason": skipped}) + "\n")
setup(**({} if skipped else extension_arguments()))
