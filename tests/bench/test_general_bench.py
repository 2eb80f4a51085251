"""The benchmark of general cells, at sizes that take no time; no time is asserted."""

from __future__ import annotations

import json

import general_cells
import pytest
import torch
from general_contestants import GeneralFastDEQ, tutorial_anderson
from general_problem import Counted, GeneralSpec, Probed, general_problem_of, like, rows, tensors
from general_race import AUTO, BARE, ENTRIES, NAMES, general_race
from general_report import general_sections, markdown
from interleave import MODES
from record import write_json

TINY = {
    "narrow": (8, 3),
    "mlp": (16, 4),
    "convolution": (2, 8, 6, 6),
    "transformer": (2, 5, 16),
    "multiscale": (2, 4, 8, 2),
    "graph": (30, 6),
}
FULL = {
    "narrow": (64, 8),
    "mlp": (256, 8),
    "convolution": (2, 48, 16, 16),
    "transformer": (1, 64, 128),
    "multiscale": (1, 16, 32, 3),
    "graph": (1800, 32),
}
SPECS = [GeneralSpec(kind, shape) for kind, shape in TINY.items()]
by_cell = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)


def test_every_cell_has_a_tiny_twin():
    assert list(TINY) == list(FULL) == list(general_cells.CELLS)


@pytest.mark.parametrize("kind", FULL)
def test_cells_contract_neither_at_once_nor_slowly(kind):
    parts = general_cells.build(kind, FULL[kind])
    z, count, left = parts.start, 0, 1.0
    with torch.no_grad():
        while left > 1e-3:
            value = parts.cell(z, parts.x)
            left = float(((rows(value) - rows(z)).norm(dim=1) / rows(value).norm(dim=1)).max())
            z, count = value, count + 1
            assert count <= 20
    assert count >= 8


@by_cell
def test_cells_are_the_same_in_every_run(spec):
    first, second = (general_cells.build(spec.kind, spec.shape) for _ in range(2))
    with torch.no_grad():
        values = [rows(parts.cell(parts.start, parts.x)) for parts in (first, second)]
    assert torch.equal(*values)


@by_cell
@pytest.mark.parametrize("mode", MODES)
def test_everybody_takes_part_and_is_verified(spec, mode):
    result = general_race(spec, mode, False)
    assert set(result.runs) == set(NAMES), result.skipped
    for entry in ENTRIES:
        facts = result.facts[entry.name]
        assert facts["residual"] <= spec.tol + 1e-5
        assert mode == "forward" or facts["adjoint_residual"] <= spec.tol + 1e-5
        evaluations, passes = result.products[entry.name]
        assert (evaluations > 1) == (mode != "backward")
        assert (passes > 1) == (mode != "forward")
    assert result.products[BARE] == result.products[AUTO.name]


@by_cell
def test_residuals_see_an_error(spec):
    problem = general_problem_of(spec)
    cell = Probed(problem)
    solver = GeneralFastDEQ(problem, 1e-5, 1e-5, cell)
    z = solver.attached()
    u = solver.gradients(z)[: cell.count]
    assert problem.state_residual(z) <= 2e-5
    assert problem.adjoint_residual(u, z) <= 2e-5
    off = like(rows(z) * 1.1, problem.start)
    assert problem.state_residual(off) > 1e-3
    assert problem.adjoint_residual(tuple(1.1 * part for part in u), z) > 1e-3


def test_the_probe_shows_the_adjoint_solution():
    problem = general_problem_of(GeneralSpec("narrow", (8, 3)))
    cell = Probed(problem)
    solver = GeneralFastDEQ(problem, 1e-6, 1e-6, cell)
    z = solver.attached()
    u = solver.gradients(z)[0]
    slope = 1 - z.detach() ** 2
    weight = problem.cell.linear.weight
    for i in range(3):
        jacobian = slope[i, :, None] * weight.detach()
        expected = torch.linalg.solve(torch.eye(8) - jacobian.T, problem.grad[i])
        torch.testing.assert_close(u[i], expected, rtol=1e-4, atol=1e-4)


def test_counts_are_those_of_a_loop_by_hand():
    problem = general_problem_of(GeneralSpec("multiscale", (2, 4, 8, 2)))
    cell = Counted(problem.cell)
    with torch.no_grad():
        for _ in range(3):
            cell(problem.start, problem.x)
    start = tuple(part.clone().requires_grad_() for part in problem.start)
    out = cell(start, problem.x)
    for inputs in (start, start, tuple(problem.cell.parameters())):
        torch.autograd.grad(out, inputs, tensors(problem.grad), retain_graph=True)
    counts = cell.counts
    assert (counts.calls, counts.graph_calls) == (3, 1)
    assert (counts.products, counts.other_passes) == (2, 1)


def test_the_tutorials_loop_solves_a_linear_map():
    matrix = 0.4 * torch.linalg.qr(torch.randn(6, 6)).Q
    c = torch.randn(3, 6)
    z = tutorial_anderson(lambda z: z @ matrix.T + c, torch.zeros(3, 6), 1e-5, 50)
    torch.testing.assert_close(
        z, torch.linalg.solve(torch.eye(6) - matrix, c.T).T, atol=1e-3, rtol=0
    )


def test_reports_of_a_short_race(tmp_path):
    spec = SPECS[0]
    races = {
        ("general", f"{spec.kind} {mode}"): general_race(spec, mode, True, 0.01) for mode in MODES
    }
    for race in races.values():
        assert set(race.medians) == set(NAMES)
        assert race.reference.startswith("torchdeq-")
        assert race.reference != "torchdeq-simple"
        assert all("overhead_us" in race.facts[entry.name] for entry in ENTRIES)
    titles = [title for title, lines in general_sections(races) if lines]
    assert len(titles) == 3
    path = tmp_path / "general.json"
    write_json(path, races, None)
    text = markdown(json.loads(path.read_text()))
    assert text.count("| narrow 8x3 |") == 4
    assert list(general_sections({})) == []


def test_who_does_not_reach_the_residual_is_listed():
    spec = GeneralSpec("narrow", (8, 2), max_iter=3)
    result = general_race(spec, "forward", False)
    assert "torchdeq-fixed-point" in result.skipped
    assert "torchdeq-fixed-point" not in result.runs
    assert "residual" in result.skipped["torchdeq-fixed-point"]
