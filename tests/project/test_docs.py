"""The examples of the README and of the page on diagnostics run as printed, and one whose number is
quoted."""

import re
import subprocess
import sys

import pytest
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


def test_diagnostics_examples_run_as_printed(tmp_path):
    printed = run("\n".join(examples("docs/diagnostics.md")), tmp_path)
    assert "1. scale = 0." in printed
    assert "['weight', 'learning_rate']" in printed


def test_initialisation_examples_run_as_printed(tmp_path):
    printed = run("\n".join([*examples("docs/initialisation.md"), "print(block)"]), tmp_path)
    assert printed.count("OrthogonalMap(scale=") == 2


def test_gradients_example_runs_as_printed(tmp_path):
    first, along, limit, penalty = examples("docs/gradients.md")
    assert run(first, tmp_path).startswith("Solution(32 samples: 32 CONVERGED")
    run(first + along + "loss.backward()\n" + limit + penalty + "loss.backward()", tmp_path)


def test_the_example_in_torchdeqs_names_runs_as_printed(tmp_path):
    (example,) = examples("docs/migrating.md")
    printed = run(example, tmp_path)
    assert printed.startswith("torch.Size([8, 16]) ['abs_lowest', 'abs_trace', 'nstep'")


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


def test_a_solver_of_ones_own(tmp_path):
    (example,) = examples("docs/own-solvers.md")
    start = example.index("@dataclass")
    assert len(example[start : example.index("weight = ")].strip().splitlines()) <= 30
    seeded = example.replace("weight =", "torch.manual_seed(0)\nweight =", 1)
    forward, counters, backward = run(seeded, tmp_path).splitlines()
    for line in (forward, backward):
        assert line.startswith("Solution(32 samples: 32 CONVERGED; iterations ")
    assert counters.startswith("tensor(")
    # Its state lies where the point does, here on a device that is not the CPU.
    state = "print({v.device.type for v in Aitken().init(point, None).values() if v is not None})"
    point = 'point = torch.zeros(2, 3, device="meta")'
    printed = run(f"{example[: example.index('weight =')]}\n{point}\n{state}", tmp_path)
    assert printed.strip() == "{'meta'}"


@pytest.mark.parametrize("cell", ["AffineCell(4, 6, scale=0.9)", "lambda z, x: 0.9 * z.cos() + x"])
def test_recipe_for_a_schedule(cell, tmp_path):
    """Tolerance, limit and specs of both directions follow the options."""
    (recipe,) = [e for e in examples("docs/usage.md") if "dataclasses.replace" in e]
    setting = f"""
import torch
from fastdeq import AffineCell, DEQLayer
torch.manual_seed(0)
layer, epochs, x = DEQLayer({cell}), 4, torch.randn(5, 4, requires_grad=True)
def train(layer):
    z = layer(x)
    z.sum().backward()
    for s in (layer.last_solution, layer.last_adjoint_solution):
        print(layer.options.tol, float(s.residual.max()), int(s.iterations.sum()))
"""
    lines = [line.split() for line in run(setting + recipe, tmp_path).splitlines()]
    assert [float(tol) for tol, _, _ in lines[::2]] == [1e-2 * 0.3**k for k in range(4)]
    for tol, residual, _ in lines:
        assert float(residual) <= float(tol)
    for direction in (lines[::2], lines[1::2]):
        counts = [int(count) for _, _, count in direction]
        assert counts == sorted(counts)
        assert counts[-1] > counts[0]
