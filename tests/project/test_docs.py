"""The examples of the README and of the page on diagnostics run as printed, and one whose number is
quoted."""

import re
import subprocess
import sys

from paths import ROOT


def run(example, folder):
    """What it prints; a warning is an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def examples(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_diagnostics_example_runs_as_printed(tmp_path):
    (example,) = examples("docs/diagnostics.md")
    assert run(example, tmp_path)


def test_gradients_example_runs_as_printed(tmp_path):
    first, along, limit, penalty = examples("docs/gradients.md")
    assert run(first, tmp_path).startswith("Solution(32 samples: 32 CONVERGED")
    setting = """
import torch, fastdeq
from fastdeq import AffineCell, DEQLayer
cell, x, criterion = AffineCell(8, 16), torch.randn(4, 8), torch.sum
"""
    layer = "layer = DEQLayer(cell)\n"
    run(setting + layer + along + "loss.backward()", tmp_path)
    run(setting + limit + penalty + "loss.backward()", tmp_path)


def test_readme_example_runs_as_printed(tmp_path):
    (example,) = examples("README.md")
    assert len(example.splitlines()) <= 12
    forward, backward = run(example, tmp_path).splitlines()
    for line in (forward, backward):
        assert line.startswith("Solution(32 samples: 32 CONVERGED; iterations ")


def test_the_error_that_a_residual_stands_for(tmp_path):
    (example,) = [e for e in examples("docs/usage.md") if "0.99 * z" in e]
    printed = "print(float(z), float(solution.residual), solution.converged.all().item())"
    value, residual, converged = run(
        f"import fastdeq, torch\n{example}\n{printed}", tmp_path
    ).split()
    assert converged == "True"
    assert 0.9e-4 < float(residual) <= 1e-4
    assert 0.9 < 100 - float(value) < 1.01  # an error of 1e-2


def test_examples_of_states_and_arguments_run_as_printed(tmp_path):
    printed = run("".join(examples("docs/states.md")), tmp_path)
    assert printed.splitlines() == [
        "torch.Size([8, 4]) torch.Size([8])",
        "torch.Size([2, 3, 5]) torch.Size([6])",
        "torch.Size([5])",
    ]


def test_recipes_for_loops_and_recurrences(tmp_path):
    recipes = [e for e in examples("docs/usage.md") if "keep_solutions" in e]
    assert len(recipes) == 2
    setting = """
import torch
from torch import nn
from fastdeq import DEQLayer
class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, z, x):
        return torch.tanh(0.5 * self.linear(z) + x)
cell, xs = Cell(), torch.randn(7, 3, 4)
batches = [(x, None) for x in torch.randn(100, 5, 4)]
"""
    training = recipes[0].replace("    ...\n", "    layer(x).sum().backward()\n")
    forward, backward = run(setting + training, tmp_path).splitlines()
    assert forward.startswith("forward: 100.0% converged")
    assert backward.startswith("adjoint: 100.0% converged")
    assert int(run(setting + recipes[1], tmp_path)) > 0
