"""How a solve is arranged: made once for each layer, its engine chosen by class of shapes."""

from types import SimpleNamespace

import pytest
import torch

from fastdeq import AffineCell, BackendError, DEQLayer
from fastdeq.backends.device import KNOWN_GPUS
from fastdeq.options import Options
from fastdeq.solve import spec
from fastdeq.solve.spec import Specs
from fastdeq.solvers import Structure

AFFINE = Structure(affine=True)


@pytest.fixture
def batches_asked(monkeypatch):
    """Rows that say they are on a GPU; the batches that an engine was chosen for."""
    asked = []

    def chosen(request, what):
        asked.append(request.batch)
        return "steps"

    monkeypatch.setattr(spec, "require_engine", chosen)
    monkeypatch.setattr(spec, "gpu_of", lambda device: KNOWN_GPUS[9, 0])
    return asked


def rows_on_gpu(batch, size=8):
    return SimpleNamespace(
        device=torch.device("cuda", 0), dtype=torch.float32, shape=torch.Size((batch, size))
    )


@pytest.mark.parametrize("batches", [(513, 1024, 700), (1024, 513), (700,)])
def test_the_choice_does_not_depend_on_which_batch_came_first(batches, batches_asked):
    forward = Specs(Options(), AFFINE).forward
    for batch in batches:
        forward.engine(rows_on_gpu(batch))
    assert batches_asked == [1024]


def test_each_power_of_two_of_the_batch_has_its_choice(batches_asked):
    forward = Specs(Options(), AFFINE).forward
    for batch in (1, 2, 3, 4, 5, 8, 9):
        forward.engine(rows_on_gpu(batch))
    assert batches_asked == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
def test_a_compiled_layer_leaves_the_choice_to_the_operator(backend, batches_asked, monkeypatch):
    """Its batch may be symbolic; the backend that was asked for is kept."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert Specs(Options(backend=backend), AFFINE).forward.engine(rows_on_gpu(4)) == backend
    assert batches_asked == []


@pytest.mark.parametrize("adjoint", ["minres", "neumann"])
def test_inference_needs_nothing_of_the_adjoint(adjoint):
    """MINRES needs a symmetric weight, which only its own use asks for."""
    layer = DEQLayer(AffineCell(3, 5, scale=0.5), adjoint=adjoint)
    with torch.no_grad():
        assert layer(torch.randn(2, 3)).shape == (2, 5)
    if adjoint == "minres":
        with pytest.raises(ValueError, match="minres"):
            layer(torch.randn(2, 3))


def test_a_backend_that_cannot_be_had_is_named_for_the_solve_first():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    layer = DEQLayer(AffineCell(3, 5, scale=0.5), backend="cuda")
    with pytest.raises(BackendError, match=r"for this solve \("):
        layer(torch.randn(2, 3))
    with pytest.raises(BackendError, match="CUDA"):
        layer(torch.randn(0, 3))


class Bounded(torch.nn.Module):
    """A weight that states a bound on its norm, which may change from call to call."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(0.3 * torch.eye(5))
        self.bound = 0.3

    def forward(self):
        return self.weight

    def norm_bound(self):
        return self.bound


def test_specs_are_kept_while_the_structure_stays_and_never_heaped_up():
    weight = Bounded()
    layer = DEQLayer(AffineCell(3, 5, weight=weight))
    made = []
    for weight.bound in (0.3, 0.3, 0.4, 0.5, 0.5):
        layer(torch.randn(2, 3))
        assert layer.last_solution.contraction == weight.bound  # not that of an earlier call
        held = [value for value in vars(layer).values() if isinstance(value, Specs)]
        assert len(held) == 1
        made += [held[0]] if held[0] not in made else []
        assert len(held[0].forward.engines_chosen) == 1
    assert [specs.structure.contraction for specs in made] == [0.3, 0.4, 0.5]
