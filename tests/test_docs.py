"""The examples of the README and of the page on diagnostics run as printed."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_diagnostics_example_runs_as_printed(tmp_path):
    page = (ROOT / "docs" / "diagnostics.md").read_text()
    for example in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", example],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr


def test_readme_example_runs_as_printed(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 12
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    forward, backward = done.stdout.splitlines()
    for line in (forward, backward):
        assert line.startswith("Solution(32 samples: 32 CONVERGED; iterations ")
