"""The choice of an engine for the solve of an affine cell, from its table: no GPU is needed."""

from types import SimpleNamespace

import pytest
import torch

from fastdeq import (
    AffineCell,
    BackendError,
    DEQLayer,
    Picard,
    driver,
    engines,
    extension,
    ops,
    parametrizations,
    solution,
    streams,
)
from fastdeq.affine import encode
from fastdeq.engines import Request
from fastdeq.gpus import KNOWN_GPUS
from fastdeq.info_shape import report_shape
from fastdeq.solvers import GMRES, MINRES, Anderson, Energy

HOPPER = KNOWN_GPUS[9, 0]


def request_for(size, batch, solver=None, *, device="cuda", dtype=torch.float32, **more):
    name, options = encode(solver or Picard())
    gpu = HOPPER if device == "cuda" else None
    base = Request(device, dtype, size, batch, name, tuple(options), gpu=gpu)
    return base._replace(**more)


@pytest.fixture
def built(monkeypatch):
    """As if the extension held the CUDA engines; what fits is decided by a stand-in."""
    limit = 2000

    def why_not_persistent(size, batch, itemsize, window, multiprocessors, shared):
        assert (multiprocessors, shared) == HOPPER[1:]
        return f"size {size} does not fit" if size * itemsize > 4 * limit else ""

    module = SimpleNamespace(why_not_persistent=why_not_persistent)
    monkeypatch.setattr(extension, "module", module)
    monkeypatch.setattr(extension, "has_cuda", True)


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(ops, "triton_missing", lambda: "triton is not installed")


def name_of(request, backend="auto"):
    engine = engines.choose(request, backend)
    return engine and engine.name


@pytest.mark.usefixtures("built")
class TestWithTheCudaEngines:
    @pytest.mark.parametrize(
        ("size", "batch", "expected"),
        [
            (64, 32, "persistent"),
            (256, 1024, "persistent"),
            (1024, 16, "persistent"),
            (1024, 1024, "steps"),
            (2048, 4096, "steps"),
            (2048, 8, "steps"),
        ],
    )
    def test_a_shape_has_its_engine(self, size, batch, expected):
        assert name_of(request_for(size, batch, Anderson())) == expected

    def test_structured_solvers_are_served_by_triton(self):
        assert name_of(request_for(256, 64, Energy(momentum=True))) == "steps"
        assert name_of(request_for(256, 64, MINRES())) == "steps"

    def test_what_no_engine_serves_is_left_to_the_reference(self):
        assert name_of(request_for(256, 64, GMRES())) is None

    def test_double_precision_has_no_triton_form(self):
        wide = request_for(64, 64, dtype=torch.float64)
        assert name_of(wide) == "persistent"
        assert name_of(wide, "triton") is None
        assert "float64" in engines.reasons(wide, "triton")

    def test_narrow_products_rule_out_engines_without_them(self):
        assert name_of(request_for(64, 8, precision="mixed")) == "steps"

    def test_a_backend_asked_for_limits_the_choice(self):
        assert name_of(request_for(64, 32), "triton") == "whole_solve"
        assert name_of(request_for(300, 32), "triton") == "steps"
        assert name_of(request_for(64, 32), "cuda") == "persistent"

    def test_an_old_device_is_refused_with_its_capability(self):
        old = request_for(64, 32, gpu=HOPPER._replace(capability=(7, 5)))
        assert "8.0" in engines.reasons(old, "cuda")
        assert name_of(old, "cuda") is None

    def test_the_first_reason_is_the_plan_that_does_not_fit(self):
        assert "does not fit" in engines.reasons(request_for(4096, 2), "cuda")


@pytest.mark.usefixtures("without_triton")
@pytest.mark.skipif(extension.has_cuda, reason="the extension has the CUDA engines")
def test_without_any_engine_the_reference_serves_and_a_backend_asked_for_raises():
    wanted = request_for(64, 32)
    assert name_of(wanted) is None
    w, c = 0.1 * torch.eye(4), torch.randn(3, 4)
    arguments = (w, c, None, "tanh", "picard", [1.0, 0.0], 1e-6, 50, "auto", False, False)
    assert (engines._solve("solve_affine", "auto", wanted, arguments)[1] == 0).all()
    for backend in ("cuda", "triton"):
        with pytest.raises(BackendError, match="cannot serve") as caught:
            engines._solve("solve_affine", backend, wanted, arguments)
        assert "backend='auto'" in str(caught.value)
    mixed = wanted._replace(precision="mixed")
    with pytest.raises(BackendError, match="precision='mixed' cannot serve"):
        engines._solve("solve_affine", "auto", mixed, arguments)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_gpu_backend_refuses_cpu_tensors_with_the_reason(backend):
    layer = DEQLayer(AffineCell(3, 5, scale=0.5), backend=backend)
    with pytest.raises(BackendError, match="CUDA tensors"):
        layer(torch.randn(2, 3))


class TestReportOfAShape:
    def test_names_the_engine_and_why_no_other_is_it(self):
        text = report_shape(256, 1024)
        assert "256" in text
        assert "1024 samples" in text
        for engine in engines.ENGINES:
            assert engine.name in text
        assert text.count("forward:") == text.count("adjoint:") == 1

    def test_on_the_cpu(self):
        served = "C++ engine" if extension.module else "the reference"
        assert served in report_shape(64, 8, device="cpu")
        gmres = report_shape(64, 8, device="cpu", adjoint="gmres")
        assert "gmres" in gmres.lower()

    def test_an_unknown_capability_or_name_is_an_error_with_the_choices(self):
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match=r"9\.0"):
                report_shape(64, 8, capability=(3, 5))
        with pytest.raises(ValueError, match="dense"):
            report_shape(64, 8, weight="dence")


class TestRecordingInAGraph:
    @pytest.fixture
    def recording(self, monkeypatch):
        state = SimpleNamespace(on=True)
        for module in (solution, parametrizations):
            monkeypatch.setattr(module, "is_capturing", lambda device: state.on)
        return state

    def test_no_status_is_looked_at(self, recording):
        layer = DEQLayer(AffineCell(3, 5, scale=0.9), max_iter=1, on_failure="raise")
        layer(torch.randn(2, 3)).sum().backward()
        assert not layer.last_solution.converged.all()

    def test_a_solver_that_reads_from_the_device_is_refused(self, monkeypatch):
        monkeypatch.setattr(driver, "is_capturing", lambda device: True)
        layer = DEQLayer(lambda z, x: 0.3 * z + x, adjoint="gmres")
        x = torch.randn(2, 3, requires_grad=True)
        with pytest.raises(RuntimeError, match=r"gmres.*CUDA graph"):
            layer(x).sum().backward()

    def test_factors_are_computed_at_every_call_and_after_it(self, recording, count_factorisations):
        cell = AffineCell(3, 5, weight="orthogonal", scale=0.9)
        recording.on = False
        cell.recurrent_weight()
        before = len(count_factorisations)
        cell.recurrent_weight()
        assert len(count_factorisations) == before
        recording.on = True
        cell.recurrent_weight()
        recording.on = False
        cell.recurrent_weight()  # a replay may have changed the matrix
        assert len(count_factorisations) == before + 2


class TestLateFlag:
    def test_off_a_gpu_the_answer_is_the_flag_itself(self):
        flag = streams.LateFlag(torch.device("cpu"))
        assert flag.goes_on(torch.tensor(True))
        assert not flag.goes_on(torch.tensor(False))

    def test_on_a_gpu_it_is_the_flag_of_the_call_before(self, monkeypatch):
        """With stand-ins for events and pinned memory."""
        waited = []

        class Event:
            def record(self, stream):
                pass

            def synchronize(self):
                waited.append(self)

        empty = torch.empty
        monkeypatch.setattr(
            torch, "empty", lambda *args, pin_memory=False, **more: empty(*args, **more)
        )
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(streams, "is_capturing", lambda device: False)
        flag = streams.LateFlag(torch.device("cuda"))
        answers = [flag.goes_on(torch.tensor(b)) for b in (True, True, False, True)]
        assert answers == [True, True, True, False]
        assert len({id(event) for event in waited}) == 3

    def test_while_recording_it_always_goes_on(self, monkeypatch):
        monkeypatch.setattr(streams, "is_capturing", lambda device: True)
        flag = streams.LateFlag(torch.device("cuda"))
        assert flag.goes_on(torch.tensor(False))
