"""Memory that a cell frees is not returned to the system before the next evaluation."""

import platform
import subprocess
import sys

import pytest
from paths import CASES

from fastdeq.backends import extension


@pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
@pytest.mark.parametrize("size", [1000, 9001, 12288, 12289, 16000])
def test_no_page_faults_between_evaluations(size):
    """A state has 16 to 250 pages; up to six times as many came back in each evaluation."""
    command = [sys.executable, str(CASES / "page_faults.py"), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2
