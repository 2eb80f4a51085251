"""Builds the one extension ``fastdeq._C``. Everything else about the package is in pyproject.toml.

CXX="ccache g++"         the C++ compiler, with launchers and flags
FASTDEQ_NO_EXT=1         install without it; plain PyTorch does every operation
FASTDEQ_ARCH=native      (default) the CPU engine for this machine, and one for any other
FASTDEQ_ARCH=portable    engines for AVX-512, AVX2 and any other, chosen when fastdeq is loaded
CUDA sources join when torch has CUDA and there is an nvcc of the same major version. They are for
TORCH_CUDA_ARCH_LIST, or else for the GPUs that are visible, or else for 8.0 and 9.0.

What was built, or why not, goes into ``fastdeq/_build.json`` for ``python -m fastdeq info``.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
toolchain = SimpleNamespace(**runpy.run_path(str(ROOT / "csrc" / "toolchain.py")))
COMPILER = toolchain.compiler_command(os.environ)
LEFT_OUT = os.environ.get("FASTDEQ_NO_EXT", "0") not in ("", "0")
HOW = "Install torch first and use --no-build-isolation, or set FASTDEQ_NO_EXT=1."


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc" / folder).glob(suffix))


def use_compiler() -> None:
    """Has torch compile and link with all of CXX."""
    os.environ["CXX"] = toolchain.as_one_word(COMPILER, ROOT / "build" / "compiler")
    if len(COMPILER) > 1:  # no launcher of torch's own choice before those that CXX names
        os.environ["TORCH_NO_COMPILER_WRAPPER"] = "1"


def extension_arguments(record: dict) -> dict:
    toolkit = toolchain.toolkit_of_nvcc()
    if toolkit and not {"CUDA_HOME", "CUDA_PATH"} & set(os.environ):
        os.environ["CUDA_HOME"] = toolkit
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        sys.exit(f"fastdeq: torch is not importable in the build environment ({error}). {HOW}")

    runpy.run_path(str(ROOT / "csrc" / "generate_constants.py"))["write"]()
    use_compiler()
    try:
        targets = toolchain.cpu_targets(COMPILER, os.environ.get("FASTDEQ_ARCH", "native"))
    except ValueError as error:
        sys.exit(f"fastdeq: {error}.")
    left_out = {f"csrc/cpu/target_{t}.cpp" for t in ("avx512", "avx2") if t not in targets}
    files = sources("", "*.cpp") + [f for f in sources("cpu", "*.cpp") if f not in left_out]
    record["torch"] = torch.__version__
    record["why_no_cuda"] = toolchain.why_no_cuda(torch.version.cuda, cpp_extension.CUDA_HOME)
    cuda = not record["why_no_cuda"]
    defines = [f"-DFASTDEQ_WITH_CUDA={int(cuda)}", *(f"-DFASTDEQ_HAS_{t.upper()}" for t in targets)]
    compile_flags, link_flags = toolchain.size_flags(os.environ)
    flags = {"cxx": ["-O3", "-std=c++20", "-Wall", *compile_flags, *defines]}
    flags["cxx"] += toolchain.openmp_flags(COMPILER)
    make = cpp_extension.CppExtension
    if cuda:
        make = cpp_extension.CUDAExtension
        files += sources("cuda", "*.cu")
        flags["nvcc"] = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]
        requested = os.environ.get("TORCH_CUDA_ARCH_LIST")
        architectures = toolchain.cuda_architectures(requested, torch.cuda.device_count())
        if architectures:
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        record["architectures"] = architectures or "the GPUs that were visible"
    elif torch.version.cuda is not None:
        print(f"fastdeq: leaving out CUDA sources: {record['why_no_cuda']}.", file=sys.stderr)
    extension = make(
        "fastdeq._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=flags,
        extra_link_args=link_flags,
    )
    # A failed compilation stops the installation: a slower package must be asked for.
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    }


skipped = "it was left out by FASTDEQ_NO_EXT" if LEFT_OUT else toolchain.why_no_compiler(COMPILER)
if skipped:
    print(f"fastdeq: installing without the compiled extension: {skipped}.", file=sys.stderr)
record = {"reason": skipped, "on_purpose": LEFT_OUT}
arguments = {} if skipped else extension_arguments(record)
(ROOT / "fastdeq" / "_build.json").write_text(json.dumps(record) + "\n")
setup(**arguments)
