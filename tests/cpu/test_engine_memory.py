"""The CPU engine asks for memory before its loop, never in it."""

import json
import os
import platform
import shutil
import subprocess
import sys

import pytest
from paths import CASES

from fastdeq.backends import extension

COMPILER = os.environ.get("CXX", "c++").split()
pytestmark = [
    pytest.mark.skipif(
        extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
    ),
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the counter is for glibc"),
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    library = tmp_path_factory.mktemp("counter") / "libcounter.so"
    source = CASES / "engine_allocations.cpp"
    # -fno-builtin: a call of malloc and its like is not to be merged or dropped.
    flags = ["-O2", "-shared", "-fPIC", "-fno-builtin", "-o", str(library)]
    subprocess.run([*COMPILER, *flags, str(source)], check=True, timeout=120)
    return library


def count(counter, threads):
    environment = {**os.environ, "LD_PRELOAD": str(counter), "OMP_NUM_THREADS": str(threads)}
    environment["OMP_WAIT_POLICY"] = "passive"  # a thread that spins may wait for a busy processor
    done = subprocess.run(
        [sys.executable, str(CASES / "engine_allocations.py"), str(threads)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_longer_solve_asks_for_memory_no_more_often(counter, threads):
    results = count(counter, threads)
    assert threads > 1 or any(result["implementation"] == "reference" for result in results)
    for result in results:
        few, many = result["requests"]
        short, long = result["updates"]
        assert long >= 10 * short, result  # there is a loop to speak of
        assert few > 0, result  # the counter counts
        if result["implementation"] == "engine":
            assert few == many, result
        else:  # plain PyTorch takes memory in every iteration: such a loop would be seen
            assert many > few + long, result
