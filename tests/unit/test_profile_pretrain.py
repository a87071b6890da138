from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from personvit.ops import set_backend

ROOT = Path(__file__).parents[2]


@pytest.fixture
def profiler(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("profile_pretrain")
    set_backend("auto")
    for name in ("profile_pretrain", "bench_pretrain", "eager_ibot", "harness"):
        sys.modules.pop(name, None)


def event(name: str, cat: str, ts: float, dur: float, tid: int = 1) -> dict:
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid}


def test_busy_is_the_union(profiler) -> None:
    assert profiler.busy_seconds([]) == 0
    assert profiler.busy_seconds([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == 4
    assert profiler.busy_seconds([(0, 10), (2, 3), (9, 11)]) == 11


def test_a_gpu_trace_is_summed_up_per_step(profiler) -> None:
    events = [
        event("aten::mm", "cpu_op", 0, 900),
        event("gemm", "kernel", 10, 100, tid=7), event("gemm", "kernel", 200, 300, tid=7),
        event("norm", "kernel", 150, 100, tid=8),  # 50 us of it beside a gemm
        event("Memcpy HtoD", "gpu_memcpy", 600, 20, tid=7), event("Memset", "gpu_memset", 650, 10, tid=7),
        event("cudaStreamSynchronize", "cuda_runtime", 700, 50), event("cudaLaunchKernel", "cuda_runtime", 5, 2),
        {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    summary = profiler.summarise(events, wall=1.6e-3, steps=2, gpu=True)
    assert (summary.launches, summary.copies, summary.waits) == (1.5, 1, 0.5)
    assert summary.wall == pytest.approx(800e-6)
    assert summary.busy == pytest.approx((100 + 350 + 20 + 10) / 2 * 1e-6)
    assert [(name, calls) for name, calls, _ in summary.lines][:2] == [("gemm", 1), ("norm", 0.5)]
    assert summary.lines[0][2] == pytest.approx(200e-6)


def test_operators_on_a_cpu_count_without_what_they_called(profiler) -> None:
    events = [
        event("aten::linear", "cpu_op", 0, 100), event("aten::addmm", "cpu_op", 10, 60),
        event("aten::copy_", "cpu_op", 20, 15), event("aten::copy_", "cpu_op", 80, 10),
        event("aten::linear", "cpu_op", 100, 5),  # begins where the first ends
        event("aten::mul", "cpu_op", 30, 40, tid=2),  # another thread
    ]  # fmt: skip
    summary = profiler.summarise(events, wall=200e-6, steps=1, gpu=False)
    own = {name: (calls, round(1e6 * seconds)) for name, calls, seconds in summary.lines}
    assert own == {"aten::linear": (2, 35), "aten::addmm": (1, 45), "aten::copy_": (2, 25), "aten::mul": (1, 40)}
    assert summary.busy == pytest.approx(105e-6)


def test_a_step_is_profiled_and_its_trace_kept(profiler, tmp_path, monkeypatch, capsys) -> None:
    trace = tmp_path / "step.json.gz"
    argv = ["profile_pretrain.py", "--device", "cpu", "--images", "2", "--steps", "1", "--trace", str(trace)]
    monkeypatch.setattr(sys, "argv", argv)
    profiler.main()
    text = capsys.readouterr().out
    assert "aten::addmm" in text
    names = {entry["name"] for entry in profiler.read_events(trace)}
    assert "aten::gelu_backward" in names
    before = trace.read_bytes()
    with pytest.raises(SystemExit):
        profiler.main()
    assert trace.read_bytes() == before
