"""What is decided by the CUDA stream: solves that are recorded in a graph, and flags read late."""

from types import SimpleNamespace

import pytest
import torch

from fastdeq import AffineCell, DEQLayer, cuda_stream, solution
from fastdeq.solvers import loop
from fastdeq.weights import factor_cache


class TestRecordingInAGraph:
    @pytest.fixture
    def recording(self, monkeypatch):
        state = SimpleNamespace(on=True)
        for module in (solution, factor_cache):
            monkeypatch.setattr(module, "is_capturing", lambda device: state.on)
        return state

    def test_no_status_is_looked_at(self, recording):
        layer = DEQLayer(AffineCell(3, 5, scale=0.9), max_iter=1, on_failure="raise")
        layer(torch.randn(2, 3)).sum().backward()
        assert not layer.last_solution.converged.all()

    def test_a_solver_that_reads_from_the_device_is_refused(self, monkeypatch):
        monkeypatch.setattr(loop, "is_capturing", lambda device: True)
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


def running(*samples):
    return torch.tensor(samples, dtype=torch.bool)


class TestDelayedCount:
    def test_off_a_gpu_the_answer_is_the_count_itself(self):
        count = cuda_stream.DelayedCount(torch.device("cpu"), 3)
        assert count.left(running(1, 0, 1)) == 2
        assert count.left(running(0, 0, 0)) == 0

    def test_on_a_gpu_it_is_the_count_of_the_call_before(self, monkeypatch):
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
        monkeypatch.setattr(cuda_stream, "is_capturing", lambda device: False)
        count = cuda_stream.DelayedCount(torch.device("cuda"), 3)
        seen = [(1, 1, 1), (1, 1, 0), (0, 0, 0), (0, 1, 0)]
        assert [count.left(running(*s)) for s in seen] == [3, 3, 2, 0]
        assert len({id(event) for event in waited}) == 3

    def test_while_recording_all_go_on(self, monkeypatch):
        monkeypatch.setattr(cuda_stream, "is_capturing", lambda device: True)
        count = cuda_stream.DelayedCount(torch.device("cuda"), 5)
        assert count.left(running(0, 0)) == 5
