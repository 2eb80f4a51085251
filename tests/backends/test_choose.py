"""The choice of an engine for the solve of an affine cell, from its table: no GPU is needed."""

from types import SimpleNamespace

import pytest
import torch

from fastdeq import AffineCell, BackendError, DEQLayer, Picard
from fastdeq.__main__ import report_shape
from fastdeq.backends import choose, extension
from fastdeq.backends.choose import Request, choose_engine, require_engine
from fastdeq.backends.device import KNOWN_GPUS
from fastdeq.solvers import GMRES, MINRES, Anderson, Energy, SolveOptions

HOPPER = KNOWN_GPUS[9, 0]


def request_for(size, batch, solver=None, *, device="cuda", precision="auto", **more):
    options = SolveOptions.of(solver or Picard(), tol=1e-4, max_iter=100, precision=precision)
    gpu = HOPPER if device == "cuda" else None
    return Request(device, torch.float32, size, batch, options, gpu=gpu)._replace(**more)


@pytest.fixture
def built(monkeypatch):
    """As if the extension held the CUDA engine; what fits is decided by a stand-in."""

    def why_not_persistent(size, batch, element_bytes, window, multiprocessors, shared_bytes):
        assert (multiprocessors, shared_bytes) == HOPPER[1:]
        return f"size {size} does not fit" if size * element_bytes > 8000 else ""

    module = SimpleNamespace(why_not_persistent=why_not_persistent)
    monkeypatch.setattr(extension, "module", module)
    monkeypatch.setattr(extension, "has_cuda", True)


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(choose, "triton_missing", lambda: "triton is not installed")


def reasons(request):
    engine, found = choose_engine(request)
    assert engine is None
    return "; ".join(found.values())


@pytest.mark.usefixtures("built")
class TestWithTheCudaEngine:
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
        assert choose_engine(request_for(size, batch, Anderson())).engine == expected

    def test_structured_solvers_are_those_of_the_steps(self):
        assert choose_engine(request_for(256, 64, Energy(momentum=True))).engine == "steps"
        assert choose_engine(request_for(256, 64, MINRES())).engine == "steps"

    def test_what_no_other_engine_can_is_left_to_the_reference(self):
        assert choose_engine(request_for(256, 64, GMRES())).engine == "reference"

    def test_double_precision_is_not_in_triton(self):
        wide = request_for(64, 64, dtype=torch.float64)
        assert choose_engine(wide).engine == "persistent"
        assert "float64" in reasons(wide._replace(backend="triton"))

    def test_a_large_product_in_double_precision_stays_on_the_chip(self):
        wide = request_for(900, 1000, dtype=torch.float64)
        assert choose_engine(wide).engine == "persistent"

    def test_low_precision_rules_out_engines_without_it(self):
        assert choose_engine(request_for(64, 8, precision="mixed")).engine == "steps"

    def test_a_requested_backend_limits_the_choice(self):
        assert choose_engine(request_for(64, 32, backend="triton")).engine == "whole"
        assert choose_engine(request_for(300, 32, backend="triton")).engine == "steps"
        assert choose_engine(request_for(64, 32, backend="cuda")).engine == "persistent"
        assert choose_engine(request_for(64, 32, backend="reference")).engine == "reference"

    def test_an_old_device_is_refused_with_its_capability(self):
        old = request_for(64, 32, backend="cuda", gpu=HOPPER._replace(capability=(7, 5)))
        assert "8.0" in reasons(old)

    def test_the_reason_is_the_plan_that_does_not_fit(self):
        assert "does not fit" in reasons(request_for(4096, 2, backend="cuda"))


@pytest.mark.skipif(extension.module is None, reason="no extension here")
def test_the_extension_itself_says_what_fits(monkeypatch):
    """No stand-in: its plans are compiled in with and without the CUDA sources."""
    monkeypatch.setattr(extension, "has_cuda", True)
    for size, batch, solver in ((64, 32, Picard()), (250, 9, Anderson()), (1000, 100, Picard())):
        assert choose_engine(request_for(size, batch, solver)).engine == "persistent"
    assert "does not fit" in reasons(request_for(5000, 2, backend="cuda"))


@pytest.mark.usefixtures("without_triton")
@pytest.mark.skipif(extension.has_cuda, reason="the extension has the CUDA engine")
def test_without_any_engine_there_is_the_reference_and_a_requested_backend_raises():
    assert choose_engine(request_for(64, 32)).engine == "reference"
    for backend in ("cuda", "triton"):
        with pytest.raises(BackendError, match="not available") as caught:
            require_engine(request_for(64, 32, backend=backend), "adjoint solve")
        assert "Available here: 'auto', 'reference'" in str(caught.value)
        assert "adjoint solve (picard" in str(caught.value)
    with pytest.raises(BackendError, match="precision='mixed' is not available") as caught:
        require_engine(request_for(64, 32, precision="mixed"))
    for engine in choose.ENGINES:
        assert f"{engine.name}: " in str(caught.value)


def test_on_the_cpu_it_is_the_cpp_engine_or_the_reference():
    expected = "reference" if extension.why_missing else "cpp"
    assert choose_engine(request_for(64, 8, device="cpu")).engine == expected
    assert choose_engine(request_for(64, 8, GMRES(), device="cpu")).engine == "reference"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_gpu_backend_refuses_cpu_tensors_with_the_reason(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layer = DEQLayer(AffineCell(3, 5, scale=0.5), backend=backend)
    with pytest.raises(BackendError, match="CUDA tensors"):
        layer(torch.randn(2, 3))


class TestOncePerShapeClass:
    @pytest.fixture
    def asked(self, monkeypatch):
        calls = []
        original = choose.choose_engine

        def counted(request):
            calls.append(request)
            return original(request)

        monkeypatch.setattr(choose, "choose_engine", counted)
        return calls

    def test_a_layer_chooses_once_for_each_direction_and_dtype(self, asked):
        layer = DEQLayer(AffineCell(3, 5, scale=0.5))
        for batch in (2, 7, 2):
            layer(torch.randn(batch, 3)).sum().backward()
        assert len(asked) == 2
        layer.double()
        layer(torch.randn(2, 3).double()).sum().backward()
        assert len(asked) == 4

    def test_inference_does_not_ask_for_the_adjoint(self, asked):
        layer = DEQLayer(AffineCell(3, 5, scale=0.5))
        with torch.no_grad():
            layer(torch.randn(2, 3))
        assert [request.options.solver for request in asked] == ["anderson"]


class TestReportOfAShape:
    def test_names_the_engine_and_why_no_other_is_it(self):
        text = report_shape(256, 1024)
        assert "256" in text
        assert "1024 samples" in text
        for engine in choose.ENGINES:
            assert engine.name in text
        assert text.count("forward:") == text.count("adjoint:") == 1

    def test_on_the_cpu(self):
        chosen = 'cpp (backend="cpp")' if extension.module else "reference"
        assert chosen in report_shape(64, 8, device="cpu")
        gmres = report_shape(64, 8, device="cpu", adjoint="gmres")
        assert "gmres" in gmres.lower()

    def test_an_unknown_capability_or_name_is_an_error_with_the_choices(self):
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match=r"9\.0"):
                report_shape(64, 8, capability=(3, 5))
        with pytest.raises(ValueError, match="dense"):
            report_shape(64, 8, weight="dence")
