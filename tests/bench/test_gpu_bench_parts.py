"""The parts of ``make gpu``: what is counted, timed, judged, computed and shown."""

from __future__ import annotations

import contextlib

import gpu_bench
import gpu_calls
import gpu_floor
import gpu_machine
import gpu_report
import gpu_run
import gpu_supervise
import pytest
import torch
from gpu_clock import Clock, interleaved
from gpu_contestants import DeviceProblem, Replayed
from problems import Problem, Spec

CPU = torch.device("cpu")


def test_calls_are_counted_inside_their_range():
    call = gpu_calls.HostCall
    recorded = [
        call("cudaDeviceSynchronize", 0, 5),
        call("counted: a", 10, 100),
        call("cudaLaunchKernel", 11, 12),
        call("cuLaunchKernelEx", 13, 14),
        call("cudaLaunchCooperativeKernel_v9000", 15, 16),
        call("cudaStreamSynchronize_v3020", 20, 90),
        call("cudaMemcpyAsync", 18, 19),
        call("aten::mm", 30, 40),
        call("cuMemcpyDtoH_v2", 92, 95),
        call("cudaMalloc", 96, 97),
        call("cudaDeviceSynchronize", 101, 110),
    ]
    assert gpu_calls.calls_in(recorded, "counted: a") == (2, 3, 1)
    with pytest.raises(ValueError, match="did not record the range 'b'"):
        gpu_calls.calls_in(recorded, "b")


def test_the_profiler_records_what_other_threads_do():
    x = torch.ones(3, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        with torch.profiler.record_function("counted: a"):
            (x * 2).sum().backward()
        torch.zeros(2)
    names = gpu_calls.names_in(gpu_calls.host_calls(recorded), "counted: a")
    assert "MulBackward0" in names
    assert "aten::zeros" not in names


class Fake:
    """What is used of a CUDA event, stream or graph."""

    def __init__(self, **options):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append(name)

    def elapsed_time(self, other):
        return 2.0


@pytest.fixture
def fake_cuda(monkeypatch):
    """The parts of torch.cuda that only a GPU has, so that the lines that use them run."""
    for name in ("synchronize", "_sleep", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *arguments: 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *arguments: 4 * 2**20)
    for name in ("Event", "Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Fake)
    monkeypatch.setattr(torch.cuda, "current_stream", Fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())


def test_the_clock_of_a_device(fake_cuda):
    clock, ran = Clock(torch.device("cuda")), []
    assert clock.seconds(lambda: ran.append(1)) == 2e-3
    assert clock.median(lambda: ran.append(1), 2) == 2e-3
    assert clock.queued(lambda: ran.append(1), 4) == 2e-3 / 4
    assert clock.peak_mib(lambda: ran.append(1)) == 3.0
    assert len(ran) == 1 + 5 + 4 + 1
    told = []
    runs = {"a": lambda: None, "b": lambda: None}
    times = interleaved(clock, runs, 0.0, 2, 9, told.append)
    assert times == {"a": [2e-3] * 2, "b": [2e-3] * 2}
    assert sorted(told) == ["a", "a", "b", "b"]


def test_a_device_that_is_lost_ends_the_process(fake_cuda, monkeypatch):
    clock = Clock(torch.device("cuda"))
    assert clock.survived(ValueError("one\ntwo")) == "ValueError: one"

    def lost(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(SystemExit) as ended:
        clock.survived(ValueError("one"))
    assert ended.value.code == 3


def test_a_recorded_contestant(fake_cuda):
    problem = DeviceProblem(Spec(8, 4, weight="orthogonal"), CPU)
    contestant = Replayed(problem, 1e-4, 1e-4)
    z = contestant.attached()
    assert problem.state_residual(z) < problem.allowed
    assert contestant.full() is contestant.gradients(z)
    assert contestant.infer() is z
    assert contestant.graph.calls == ["replay"] * 3


def test_the_bound_on_the_gradient_is_a_bound():
    spec = Spec(24, 40)
    own, theirs = DeviceProblem(spec, CPU), Problem(spec)
    z, grad_x = torch.randn(40, 24), torch.randn(40, 24)
    grad_weight = torch.randn(24, 24)
    error, bound = own.weight_error(z, grad_weight, grad_x)
    expected, exact = theirs.weight_error(z, grad_weight, grad_x)
    assert error == pytest.approx(expected)
    assert exact <= bound <= 24**0.125 * exact


def test_floors_are_operations_or_bytes():
    slow = gpu_floor.Ceilings(bandwidth=1e30, float32=1e9, bfloat16=4e9)
    floor = gpu_floor.forward_floor(10, 5, 50, False, slow)
    assert floor.float32 == pytest.approx(1e3 * 2 * 100 * 50 / 1e9)
    assert floor.bfloat16 == pytest.approx(floor.float32 / 4)
    both = gpu_floor.training_floor(10, 5, 50, slow)
    assert both.float32 == pytest.approx(1e3 * 2 * 100 * (50 + 20) / 1e9)
    narrow = gpu_floor.Ceilings(bandwidth=1e6, float32=1e30, bfloat16=1e30)
    moved = 4 * (10 * 10 + 2 * 10 * 5) + 9 * 5
    assert gpu_floor.forward_floor(10, 5, 50, False, narrow).float32 == pytest.approx(moved / 1e3)
    more = gpu_floor.forward_floor(10, 5, 50, True, narrow).float32
    assert more == pytest.approx((moved + 4 * 50) / 1e3)


def test_what_pytest_and_the_sanitizer_printed_is_read():
    output = "..F\nFAILED tests/kernels/test_a.py::test_b[c] - assert\n"
    output += "=== 1 failed, 2 passed in 3.00s ===\n"
    said = gpu_run.pytest_summary(output)
    assert said == "1 failed, 2 passed in 3.00s; failed: tests/kernels/test_a.py::test_b[c]"
    assert gpu_run.pytest_summary("") == "no summary"

    def verdict(output, status=0):
        return gpu_run.sanitizer_verdict(gpu_supervise.Outcome(status, 1.0, output))

    assert verdict("8 ran, 0 wrong\n===== ERROR SUMMARY: 0 errors\n")[0] == "passed"
    assert verdict("8 ran, 0 wrong\n===== ERROR SUMMARY: 3 errors\n") == ("failed", "3 errors")
    raced = "8 ran\n===== RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    assert verdict(raced)[0] == "failed"
    assert verdict("a: 1e-1 WRONG\n8 ran\n===== ERROR SUMMARY: 0 errors\n")[0] == "failed"
    assert verdict("0 ran, 0 wrong\n===== ERROR SUMMARY: 0 errors\n")[0] == "skipped"
    assert verdict("Device not supported", 1) == ("skipped", "it could not run here")
    assert "out of time" in verdict("", None)[1]


def test_the_file_is_named_after_the_device():
    assert gpu_run.file_name("NVIDIA H100 80GB HBM3") == "gpu-nvidia-h100-80gb-hbm3.json"


def as_on_a_gpu(median, waits, launches):
    calls = {"waits": waits, "launches": launches, "allocations": 0}
    facts = {"peak_mib": 12.0, "calls": calls, "forward_calls": calls}
    return {"median_ms": median, "engines": ["triton steps", "triton steps"], **facts}


def test_the_table_of_ratios_comes_last_and_names_the_stand_in():
    contestants = {
        "fastdeq-auto": as_on_a_gpu(0.5, 1, 3),
        "fastdeq-triton-steps": as_on_a_gpu(0.4, 0, 2),
        "eager-loop": as_on_a_gpu(2.0, 20, 200),
    }
    content = {
        "note": "",
        "machine": gpu_machine.describe(CPU),
        "skipped": ["dense 0.9 512x512: time ran out"],
        "ceilings": {"bandwidth": 3e12, "float32": 5e13, "bfloat16": 8e14},
        "problems": {
            "dense 0.9 256x1024": {
                "problem": {"batch": 1024},
                "reference": gpu_bench.reference_of(contestants),
                "contestants": contestants,
                "solves": {},
                "left_out": {"torchdeq-anderson": "torchdeq is not installed"},
            }
        },
    }
    lines = list(gpu_report.lines(content))
    expected = ["dense", "0.9", "256x1024", "0.250", "0.200", "1.000", "eager-loop", "2", "ms"]
    assert lines[-1].split() == expected
    text = "\n".join(lines)
    assert "the eager loop stands in" in text
    assert "torchdeq-anderson (dense 0.9 256x1024): torchdeq is not installed" in text
    assert "1/3 1/3 12" in text
    assert "SKIPPED: dense 0.9 512x512: time ran out" in text
    assert "3 TB/s" in text
