from __future__ import annotations

import builtins
import importlib
import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from personvit import env
from personvit.ops import native
from personvit.runtime.telemetry import GpuTelemetry

PARTS = ["Python", "torch", "CUDA device", "Triton", "xformers", "DALI", "extension CPU", "extension CUDA", "NVML"]
ROOT = Path(__file__).parents[2]


def row(part: str) -> env.Row:
    return next(row for row in env.collect() if row.part == part)


def test_every_part_has_a_row_and_what_is_off_has_reason_and_remedy() -> None:
    rows = env.collect()
    assert [row.part for row in rows] == PARTS
    assert all(row.version for row in rows)
    for entry in rows:
        assert entry.on or (entry.reason and entry.remedy), entry


def test_command_prints_the_table() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "personvit.env"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    for part in PARTS:
        assert part in result.stdout
    assert "Operators" in result.stdout
    assert "block_masks" in result.stdout
    assert "can't load C++/CUDA extensions" not in result.stderr  # xformers' warning


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    gone = {"triton", "xformers", "nvidia"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name in gone else found(name))
    assert row("Triton") == env.Row("Triton", False, "-", "not installed", row("Triton").remedy)
    assert row("xformers").remedy == env.INSTALL_GPU
    assert env.INSTALL_GPU in row("DALI").remedy


def test_packages_that_break_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if name in ("triton", "xformers.ops", "nvidia.dali"):
            raise OSError(f"lib{name}.so: undefined symbol")
        return imported(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())  # also where not installed
    for part in ("Triton", "xformers", "DALI"):
        assert not row(part).on
        assert "undefined symbol" in row(part).reason
        assert row(part).remedy


def test_torch_that_does_not_import(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    imported = builtins.__import__

    def broken(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise ImportError("libtorch_cpu.so: cannot open shared object file")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    assert env.main([]) == 0
    assert "libtorch_cpu.so" in capsys.readouterr().out


def test_cpu_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    native.load_cuda.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build" in row("CUDA device").reason
    assert "CPU build" in row("extension CUDA").reason
    native.load_cuda.cache_clear()


def test_extension_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_cpu", lambda: "personvit/_C.so was not built")
    assert row("extension CPU").remedy == native.BUILD_COMMAND
    assert not row("extension CPU").on


def test_long_text_is_wrapped() -> None:
    text = env.format_table([env.Row("part", False, "1.0", "word " * 60, "command " * 20)], width=60)
    assert max(len(line) for line in text.splitlines()) <= 60
    assert "remedy: command" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without CUDA")
def test_telemetry_without_a_gpu() -> None:
    telemetry = GpuTelemetry()
    assert telemetry.sample() is None
    assert telemetry.reason


def test_telemetry_reads_what_the_device_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    pynvml = pytest.importorskip("pynvml")
    telemetry = GpuTelemetry()
    telemetry._handle, telemetry._nvml = object(), pynvml

    def refuse(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name in ("UtilizationRates", "EnforcedPowerLimit", "Temperature", "ClockInfo"):
        monkeypatch.setattr(pynvml, f"nvmlDeviceGet{name}", refuse)
    memory = type("Memory", (), {"used": 3 << 20, "total": 8 << 20})
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: memory)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda handle: 123456)
    sample = telemetry.sample()
    assert sample is not None
    assert sample.as_row() == pytest.approx(
        {"gpu_power_w": 123.456, "gpu_memory_used_mib": 3.0, "gpu_memory_total_mib": 8.0}
    )


def test_xformers_logger_is_quiet() -> None:
    env._xformers()
    assert logging.getLogger("xformers").level == logging.ERROR
