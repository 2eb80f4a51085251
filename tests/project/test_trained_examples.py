"""The examples that train a model: their short forms as a user runs them, and what their parts
claim."""

from __future__ import annotations

import re

import pytest
import torch
from run_example import import_example, run_example

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

NAMES = ["characters", "graph", "multiscale", "plant"]


@pytest.fixture(scope="module", params=NAMES)
def short_form(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    done = run_example(f"{request.param}.py", "--quick", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return request.param, done.stdout, folder


def numbers(pattern: str, text: str) -> list[float]:
    return [float(n) for n in re.findall(pattern, text)]


def check_characters(printed: str) -> None:
    bigrams, trigrams, fourgrams = numbers(r"grams (\d\.\d+) bits", printed)
    assert bigrams > trigrams > fourgrams
    losses = numbers(r"s: (\d\.\d+) bits", printed)
    held_out = numbers(r"held-out text: (\d\.\d+)", printed)
    assert len(losses) == 10
    assert len(held_out) == 2  # one for each gradient
    assert max(held_out) < 5.5  # seven bits before training
    assert numbers(r"forward (\S+)% converged", printed) == [100] * 10
    assert len(numbers(r"adjoint (\S+)% converged", printed)) == 5  # the phantom has none
    assert printed.count("    def ") >= 2


def check_graph(printed: str) -> None:
    rows = re.findall(r"^(\D+?) +(\d+\.\d)% +\d", printed, re.MULTILINE)
    accuracy = {name: float(value) for name, value in rows}
    assert len(accuracy) == 4
    assert accuracy["implicit graph network"] > 75
    assert accuracy["label spreading"] > 85
    assert printed.count("1 samples: 1 CONVERGED") == 2


def check_multiscale(printed: str) -> None:
    accuracies = numbers(r"test images: (\S+)%", printed)
    assert len(accuracies) == 2
    assert min(accuracies) > 30  # 10 by guessing
    assert numbers(r"forward: (\S+)% converged", printed) == [100, 100]
    assert max(numbers(r"average, (\S+) at most", printed)) < 1


def check_plant(printed: str) -> None:
    assert len(numbers(r"fit (\S+)%", printed)) == 2
    assert "64 CONVERGED" in printed
    (bound,) = numbers(r"further than (\S+) from", printed)
    assert bound < 1e-2
    assert numbers(r"triangular loop: (\S+) times", printed)[0] > 1


CHECKS = dict(
    zip(NAMES, [check_characters, check_graph, check_multiscale, check_plant], strict=True)
)


def test_short_form(short_form):
    name, printed, folder = short_form
    CHECKS[name](printed)
    assert f"Picture saved as {name}.png" in printed
    assert (folder / f"{name}.png").stat().st_size > 4_000


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_folder_is_refused_before_training(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--out", "nowhere/here.png"])
    with pytest.raises(SystemExit):
        import_example(name).main()
    assert "there is no folder nowhere" in capsys.readouterr().err


def test_ngrams_are_a_distribution():
    ngram_bits = import_example("characters").ngram_bits
    train = torch.tensor([1, 2, 1, 3, 1, 2, 5])
    for context in ([1, 2], [7, 1], [8, 9]):  # seen; its end seen; unknown
        chances = [
            2 ** -ngram_bits(train, torch.tensor([*context, following]), 3)
            for following in range(128)
        ]
        assert sum(chances) == pytest.approx(1, abs=1e-4)
    # By hand: of 3 after 1, 1 in 3, with 2 kinds; below it 1 in 6 characters, with 3 kinds.
    unigram = (1 + 4 / 128) / (6 + 4)
    bigram = (1 + 2 * unigram) / (3 + 2)
    assert 2 ** -ngram_bits(train, torch.tensor([1, 3]), 2) == pytest.approx(bigram, rel=1e-5)


def test_characters_see_no_later_ones():
    characters = import_example("characters")
    torch.manual_seed(0)
    model = characters.Model(16, "implicit", 1e-6)
    codes = torch.randint(128, (1, 64))
    changed = codes.clone()
    changed[0, 40] += 1
    with torch.no_grad():
        apart = (model(codes) - model(changed)).abs().amax(dim=(0, 2))
    assert apart[:40].max() < 1e-3  # the tolerance, over a contraction that is not near 1
    assert apart[40] > 0.05


def test_graph_network_contracts():
    graph = import_example("graph")
    torch.manual_seed(0)
    adjacency = graph.neighbour_graph(torch.randn(40, 3), 4)
    eigenvalues, vectors = torch.linalg.eigh(adjacency.to_dense().double())
    assert eigenvalues.abs().max() <= 1 + 1e-6
    cell = graph.Propagation(adjacency, 8, scale=0.9)
    # Where every unit is active, the eigenvector of 1 shrinks by the scale, and nothing by less.
    along = vectors[:, -1:].float() * torch.randn(8)
    for step in (along, torch.randn(40, 8)):
        moved = cell(step, torch.tensor(20.0)) - cell(torch.zeros(40, 8), torch.tensor(20.0))
        assert moved.norm() <= 0.9 * (1 + 1e-4) * step.norm()
    assert cell.weight.norm_bound() == 0.9


def test_label_spreading_is_the_linear_solve():
    graph = import_example("graph")
    torch.manual_seed(0)
    adjacency, labels = graph.neighbour_graph(torch.randn(40, 3), 4), torch.arange(40) % 10
    known = torch.arange(20)
    start = torch.zeros(40, 10)
    start[known, labels[known]] = 1
    exact = torch.linalg.solve(torch.eye(40) - 0.9 * adjacency.to_dense(), 0.1 * start)
    found = graph.spread_labels(adjacency, labels, known)
    assert (found - exact).norm() <= 1e-4 / (1 - 0.9) * exact.norm() * 1.1  # tol / (1 - s)


def test_plant_is_simulated_accurately():
    plant = import_example("plant")
    force = torch.full((60, 3), 2.0) * torch.tensor([-1.0, 0.5, 1.0])
    coarse, fine = plant.simulate(force), plant.simulate(force, substeps=64)
    # Far below the noise of the measurement.
    assert (coarse - fine).abs().max() < plant.NOISE / 50
    assert fine.abs().max() > 0.5


def test_ways_to_find_w_agree():
    pytest.importorskip("torchdeq")
    plant = import_example("plant")
    torch.manual_seed(0)
    model = plant.Model(4, 8)
    model.layer = plant.DEQLayer(model.layer.cell, tol=1e-6)
    force = torch.randn(10, 5, 1)

    def run(solve):
        model.zero_grad()
        position = model(force, solve)
        position.square().sum().backward()
        return position.detach(), {name: p.grad for name, p in model.named_parameters()}

    def agree(found, expected, below_diagonal=False):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        for name, gradient in expected[1].items():
            other = found[1][name]
            if below_diagonal and name.startswith("layer.cell.weight"):
                other, gradient = other.tril(-1), gradient.tril(-1)
            assert (other - gradient).norm() < 1e-3 * gradient.norm(), name

    agree(run(plant.torchdeq_solve(model.layer.cell, 1e-6)), run(None))
    # With a strictly triangular D the loop over neurons finds the equilibrium. What is not below
    # the diagonal it takes for zero.
    model.layer.cell.weight = plant.Orthogonal(8, 0.8, parametrized=False)
    with torch.no_grad():
        model.layer.cell.weight.weight.tril_(-1)
    agree(run(plant.triangular(model.layer.cell)), run(None), below_diagonal=True)
