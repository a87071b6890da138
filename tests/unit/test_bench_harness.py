from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def harness(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("harness", FOLDER / "harness.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "harness", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_time_and_memory_are_those_of_the_work(harness):
    if harness._reset_peak("cpu") is None:
        pytest.skip("this system does not let a process reset its peak of memory")
    held = np.ones(8 << 20)  # an input: 64 MiB that must not count

    def work():
        time.sleep(0.02)
        return (held[: 4 << 20] * 2).sum()  # 32 MiB for a moment

    measured = harness.measure(work, repeats=3)
    assert len(measured.seconds) == 3
    assert 0.02 <= measured.at(20) <= measured.at(50) <= measured.at(80) < 1
    assert 30 << 20 < measured.peak_bytes < 48 << 20


def test_rows_are_appended_with_the_machine_they_come_from(harness):
    measured = harness.Measurement((1.0, 2.0, 3.0), 5)
    for _ in range(2):
        path = harness.append_rows("some", [harness.row("rerank", "native", [2, 3], measured, scale="tiny")], "cpu")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2
    expected = {"op": "rerank", "shape": [2, 3], "dtype": "float32", "p50": 2.0, "peak_bytes": 5, "scale": "tiny"}
    assert expected.items() <= rows[0].items()
    assert {"p20", "p80", "device", "torch", "commit", "date", "threads"} <= rows[0].keys()


def test_rates_are_positive(harness):
    assert harness.matmul_rate(64, 64, 64, "cpu") > 0
    assert harness.write_rate("cpu", mib=1) > 0


def test_retrieval_benchmark_knows_goals_of_scales_that_exist(harness, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("bench_retrieval", FOLDER / "bench_retrieval.py")
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_retrieval", bench)
    spec.loader.exec_module(bench)
    assert {scale for _, scale in bench.GOALS} <= set(bench.SCALES)
    goal = bench.GOALS["rerank 20/6/0.3", "market"]
    fast, heavy = harness.Measurement((2.0,), 1 << 28), harness.Measurement((2.0,), 1 << 31)
    assert bench.verdict(goal, fast).startswith("reached")
    assert bench.verdict(goal, heavy).startswith("MISSED")
    data = bench.generate(bench.Scale(20, 60, 10, 3), 0, "cpu")
    np.testing.assert_allclose(data.gallery.features.norm(dim=1), 1, atol=1e-6)
    assert data.gallery.features.shape == (60, bench.WIDTH)
