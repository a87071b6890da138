from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from personvit.ops import backend

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
    assert {"p20", "p80", "device", "torch", "triton", "commit", "date", "threads"} <= rows[0].keys()


def test_a_row_names_its_type(harness):
    measured = harness.Measurement((1.0,), None)
    assert harness.row("attention", "triton", [2], measured, dtype="bfloat16", floor_s=1)["dtype"] == "bfloat16"


def test_rates_are_positive(harness):
    assert harness.matmul_rate(64, 64, 64, "cpu") > 0
    assert harness.matmul_rate(64, 64, 64, "cpu", dtype=torch.bfloat16) > 0
    assert harness.write_rate("cpu", mib=1) > 0


def test_copies_count_what_is_read_and_what_is_written(harness, monkeypatch):
    monkeypatch.setattr(harness, "_best", lambda work, device: 0.5)
    assert harness.copy_rate("cpu", mib=3) == 2 * (3 << 20) / 0.5


def test_a_cpu_is_measured_by_wall_clock_a_few_times(harness):
    calls = []
    measured = harness.measure_device(lambda: (calls.append(1), time.sleep(0.01)), "cpu")
    assert len(measured.seconds) == harness._CPU_REPEATS
    assert len(calls) == harness._CPU_REPEATS + 1
    assert 0.01 <= measured.at(50) < 0.1


def test_cold_flushes_before_each_call_and_outside_the_time(harness, monkeypatch):
    order = []
    monkeypatch.setattr(harness, "_flusher", lambda device: lambda: (order.append("flush"), time.sleep(0.05)))
    measured = harness.measure_device(lambda: order.append("work"), "cpu", cold=True, repeats=2, warmup=0)
    assert order == ["flush", "work"] * 2
    assert measured.at(80) < 0.05


def test_a_cpu_is_announced_as_none_of_a_gpu(harness, capsys):
    harness.announce("cpu")
    printed = capsys.readouterr().out
    assert "no GPU numbers" in printed
    assert f"torch {torch.__version__}" in printed


def test_power_is_unknown_on_a_cpu(harness):
    with harness.PowerMeter("cpu") as meter:
        pass
    assert (meter.joules, meter.watts, meter.sm_clock_mhz) == (None, None, None)


@pytest.mark.gpu
def test_a_gpu_is_measured_by_events_not_by_the_host(harness):
    a = torch.ones(4096, 4096, device="cuda")

    def work():
        time.sleep(2e-4)  # the host's: hidden behind the spinning kernel
        return a + 1

    warm, cold = (harness.measure_device(work, "cuda", cold=cold) for cold in (False, True))
    assert len(warm.seconds) == 50
    assert warm.at(50) < 1.5e-4
    assert cold.peak_bytes >= a.nbytes
    assert {"sm_clock_mhz", "memory_clock_mhz", "power_limit_w", "driver"} <= harness.machine("cuda").keys()
    assert harness.copy_rate("cuda") > 1e10
    with harness.PowerMeter("cuda") as meter:
        for _ in range(200):
            a @ a
    assert meter.joules is None or meter.joules > 0


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, bench)
    spec.loader.exec_module(bench)
    return bench


@pytest.mark.parametrize(("recipe", "gflop"), [("vit_small_luperson", 82.9), ("vit_base_luperson", 308.6)])
def test_operations_of_a_step_are_those_of_the_recipe(harness, monkeypatch, recipe, gflop):
    bench = load("bench_pretrain", monkeypatch)
    flops = bench.flops_per_image(bench.Case(recipe, 64, "cpu").config(), masked=38.0)
    assert flops / 1e9 == pytest.approx(gflop, abs=0.06)


@pytest.mark.parametrize("recipe", ["demo", "demo head.shared=false head.norm_last_layer=false"])
def test_variants_of_the_step_agree(harness, monkeypatch, recipe):
    bench = load("bench_pretrain", monkeypatch)
    monkeypatch.setattr(backend, "_operators", dict(backend._operators))  # a worker has a process of its own else
    monkeypatch.setattr(backend, "_chosen", {})
    recipe, *more = recipe.split()
    case = bench.Case(recipe, 4, "cpu", ("crops.global_size=[32,16]", "crops.local_size=[16,8]", *more))
    names = ("eager-ibot", "masked-heads", "packed")
    losses = {name: bench.Worker(name, case, 0).losses() for name in names}
    assert len(losses["packed"]) == bench.COMPARED_STEPS
    bench.check_parity(losses, "fp32")
    for place in range(4):
        values = list(losses["packed"][0])
        values[place] *= 1.01
        with pytest.raises(SystemExit, match="parity"):
            bench.check_parity({**losses, "packed": [tuple(values), *losses["packed"][1:]]}, "fp32")


def test_retrieval_benchmark_knows_goals_of_scales_that_exist(harness, monkeypatch):
    bench = load("bench_retrieval", monkeypatch)
    assert {scale for _, scale in bench.GOALS} <= set(bench.SCALES)
    goal = bench.GOALS["rerank 20/6/0.3", "market"]
    fast, heavy = harness.Measurement((2.0,), 1 << 28), harness.Measurement((2.0,), 1 << 31)
    assert bench.verdict(goal, fast).startswith("reached")
    assert bench.verdict(goal, heavy).startswith("MISSED")
    data = bench.generate(bench.Scale(20, 60, 10, 3), 0, "cpu")
    np.testing.assert_allclose(data.gallery.features.norm(dim=1), 1, atol=1e-6)
    assert data.gallery.features.shape == (60, bench.WIDTH)


def test_commit_of_a_copy_without_its_repository(harness, tmp_path, monkeypatch):
    own = harness._commit()
    monkeypatch.setenv("PERSONVIT_COMMIT", "abc1234")
    assert harness._commit() == own  # a repository knows better
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert harness._commit() == "abc1234"
    monkeypatch.delenv("PERSONVIT_COMMIT")
    assert harness._commit() == "unknown"
