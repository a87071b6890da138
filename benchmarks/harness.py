"""What every benchmark shares: times, peak memory, rates of the machine, and rows of results.

A number without a row in benchmarks/results does not exist. Rows are only ever appended.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from personvit.runtime.telemetry import GpuSample, GpuTelemetry

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_PROC = Path("/proc/self")
_CPU_REPEATS = 5
_CPU_FLUSH = 64 << 20
_SPIN_CYCLES = 2_000_000  # about a millisecond: longer than the host needs to queue the kernels of one call


@dataclass(frozen=True)
class Measurement:
    """Wall-clock seconds of some repetitions, and the highest memory that any of them took above its start."""

    seconds: tuple[float, ...]
    peak_bytes: int | None
    """Resident memory on the CPU, allocated memory on a GPU; None where the system does not tell."""

    def at(self, percent: int) -> float:
        """A percentile of the seconds."""
        return float(np.percentile(self.seconds, percent))

    def text(self) -> str:
        """Median and peak, for a table."""
        peak = "?" if self.peak_bytes is None else f"{self.peak_bytes / 2**30:.2f}"
        return f"{seconds_text(self.at(50)):>10} {peak:>9}"


def measure(
    work: Callable[[], Any],
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: str = "cpu",
    prepare: Callable[[], Any] | None = None,
) -> Measurement:
    """Run `work` and throw its result away. Inputs that it closes over count as memory of the start.

    `prepare` runs before each timed repetition and does not count.
    """
    for _ in range(warmup):
        work()
    seconds, peaks = [], []
    for _ in range(repeats):
        if prepare is not None:
            prepare()
        before = _reset_peak(device)
        begin = time.perf_counter()
        result = work()
        synchronise(device)
        seconds.append(time.perf_counter() - begin)
        peaks.append(None if before is None else _peak(device) - before)
        del result
    known = [peak for peak in peaks if peak is not None]
    return Measurement(tuple(seconds), max(0, *known, 0) if known else None)


def measure_device(
    work: Callable[[], Any],
    device: str,
    *,
    cold: bool = False,
    repeats: int = 50,
    warmup: int = 5,
    spin_cycles: int = _SPIN_CYCLES,
) -> Measurement:
    """What `work` costs the device.

    On a GPU: CUDA events around each call. The calls queue up behind a spinning kernel, so that the gaps in which a
    GPU waits for the host to launch do not count (those of `measure` do). On a CPU: wall clock, few repetitions.

    Args:
        work: its result is thrown away.
        device: "cpu", "cuda" or "cuda:1".
        cold: overwrite the L2 cache (CPU: 64 MiB) before each call. Else inputs may lie in it from the call before.
        repeats: timed calls; at most 5 on a CPU.
        warmup: calls before; at most 1 on a CPU.
        spin_cycles: how long the spinning kernel spins; more where the host takes over a millisecond for a call.
    """
    flush = _flusher(device) if cold else None
    if not device.startswith("cuda"):
        return measure(work, repeats=min(repeats, _CPU_REPEATS), warmup=min(warmup, 1), prepare=flush)
    for _ in range(warmup):
        work()
    before = _reset_peak(device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    with torch.cuda.device(_index(device)):
        for begin, end in events:
            if flush is not None:
                flush()
            torch.cuda._sleep(spin_cycles)
            begin.record()
            work()
            end.record()
    synchronise(device)
    seconds = tuple(begin.elapsed_time(end) / 1e3 for begin, end in events)
    return Measurement(seconds, max(0, _peak(device) - before))


def _flusher(device: str) -> Callable[[], Any]:
    """Writes more than the last-level cache holds."""
    size = _CPU_FLUSH
    if device.startswith("cuda"):
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.zeros(max(size, 1), dtype=torch.uint8, device=device)
    return buffer.zero_


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _reset_peak(device: str) -> int | None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed by the work before would hide that of this one
    try:
        (_PROC / "clear_refs").write_text("5")  # the kernel starts VmHWM again from here
        return _status("VmRSS")
    except (OSError, StopIteration):
        return None


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else _status("VmHWM")


def _status(key: str) -> int:
    lines = (_PROC / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def matmul_rate(rows: int, columns: int, inner: int, device: str, dtype: torch.dtype = torch.float32) -> float:
    """FLOP per second of torch.mm, [rows, inner] x [inner, columns]: the best of some runs."""
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(inner, columns, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    return 2.0 * rows * columns * inner / _best(lambda: torch.mm(a, b, out=out), device)


def write_rate(device: str, mib: int = 256) -> float:
    """Bytes per second of filling a large array: the best of some runs."""
    out = torch.empty(mib << 18, device=device)
    return out.numel() * 4 / _best(lambda: out.fill_(1.0), device)


def copy_rate(device: str, mib: int = 512) -> float:
    """Bytes per second, read and written together, of copying a large array: the best of some runs."""
    source = torch.zeros(mib << 18, device=device)
    out = torch.empty_like(source)
    return 2 * out.numel() * 4 / _best(lambda: out.copy_(source), device)


def _best(work: Callable[[], Any], device: str) -> float:
    if device.startswith("cuda"):
        return min(measure_device(work, device, repeats=20).seconds)
    return min(measure(work, repeats=10, warmup=2, device=device).seconds)


class PowerMeter:
    """Energy of a stretch of work on a GPU, read from the card's own counter through NVML.

    `with PowerMeter(device) as meter: ...`, then read the attributes. All stay None on a CPU, and where the card does
    not count. The counter moves every 20 to 100 ms and counts the whole card: let the work take seconds, alone on it.
    """

    joules: float | None = None
    watts: float | None = None
    """Mean over the stretch."""
    sm_clock_mhz: float | None = None
    """At the end of the stretch, with the work still under way."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._telemetry = GpuTelemetry(_index(device)) if device.startswith("cuda") else None

    def __enter__(self) -> PowerMeter:
        synchronise(self._device)
        self._begin, self._start = time.perf_counter(), self._counter()
        return self

    def __exit__(self, *_: object) -> None:
        sample = self._telemetry.sample() if self._telemetry is not None else None
        synchronise(self._device)
        seconds, end = time.perf_counter() - self._begin, self._counter()
        if sample is not None:
            self.sm_clock_mhz = sample.sm_clock_mhz
        if self._start is not None and end is not None:
            self.joules = end - self._start
            self.watts = self.joules / seconds

    def _counter(self) -> float | None:
        """Joules since the driver was loaded."""
        if self._telemetry is None or self._telemetry.reason is not None:
            return None
        import pynvml

        try:
            uuid = f"GPU-{torch.cuda.get_device_properties(_index(self._device)).uuid}"
            return 1e-3 * float(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid)))
        except pynvml.NVMLError:
            return None


def machine(device: str) -> dict[str, Any]:
    """What a row must tell about where and with what it was measured."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "numpy": np.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.startswith("cuda"):
        facts |= {"cuda": torch.version.cuda, "driver": _driver()}
        sample = _busy_sample(device)
        for name in ("sm_clock_mhz", "memory_clock_mhz", "power_limit_w"):
            facts[name] = None if sample is None else getattr(sample, name)
    return facts


def announce(device: str) -> None:
    """Say on what a benchmark runs, with the clocks of a GPU under load; a CPU is told from one in plain words."""
    facts = machine(device)
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "python") if facts[name])
    if device.startswith("cuda"):
        clocks = "SM {sm_clock_mhz} MHz, memory {memory_clock_mhz} MHz, power limit {power_limit_w} W".format(**facts)
        print(f"{facts['device']}: {clocks}; driver {facts['driver']}, CUDA {facts['cuda']}, {versions}")
        return
    print(f"{facts['device']}, {facts['threads']} threads; {versions}")
    print("These are CPU times, no GPU numbers: they say nothing about the speed of a GPU or of a Triton kernel.")


def append_rows(name: str, rows: list[dict[str, Any]], device: str) -> Path:
    """Add rows to benchmarks/results/NAME.jsonl, each with the facts of `machine`."""
    path = RESULTS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = machine(device)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **facts}) + "\n" for row in rows)
    return path


def row(
    op: str, backend: str, shape: list[int], measured: Measurement, dtype: str = "float32", **more: Any
) -> dict[str, Any]:
    """A row of results; seconds, bytes."""
    return {
        "op": op,
        "backend": backend,
        "shape": shape,
        "dtype": dtype,
        "p20": measured.at(20),
        "p50": measured.at(50),
        "p80": measured.at(80),
        "repeats": len(measured.seconds),
        "peak_bytes": measured.peak_bytes,
        **more,
    }


def seconds_text(seconds: float) -> str:
    """With the unit that suits it."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PERSONVIT_COMMIT", "unknown")  # of a copy without its repository


def _driver() -> str | None:
    with contextlib.suppress(ImportError):
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            return str(pynvml.nvmlSystemGetDriverVersion())
    return None


def _triton() -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("triton")
    return None


def _index(device: str) -> int:
    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


def _busy_sample(device: str) -> GpuSample | None:
    """A reading while the GPU multiplies matrices: an idle one shows the clocks of rest."""
    telemetry = GpuTelemetry(_index(device))
    a = torch.ones(4096, 4096, device=device)
    for _ in range(40):
        torch.mm(a, a)
    sample = telemetry.sample()
    synchronise(device)
    return sample
