"""What every benchmark shares: times, peak memory, rates of the machine, and rows of results.

A number without a row in benchmarks/results does not exist. Rows are only ever appended.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_PROC = Path("/proc/self")


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


def measure(work: Callable[[], Any], *, repeats: int = 5, warmup: int = 1, device: str = "cpu") -> Measurement:
    """Run `work` and throw its result away. Inputs that it closes over count as memory of the start."""
    for _ in range(warmup):
        work()
    seconds, peaks = [], []
    for _ in range(repeats):
        before = _reset_peak(device)
        begin = time.perf_counter()
        result = work()
        synchronise(device)
        seconds.append(time.perf_counter() - begin)
        peaks.append(None if before is None else _peak(device) - before)
        del result
    known = [peak for peak in peaks if peak is not None]
    return Measurement(tuple(seconds), max(0, *known, 0) if known else None)


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _reset_peak(device: str) -> int | None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed by the work before would hide that of this one
    try:
        (_PROC / "clear_refs").write_text("5")  # the kernel starts VmHWM again from here
        return _status("VmRSS")
    except (OSError, StopIteration):
        return None


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


def _status(key: str) -> int:
    lines = (_PROC / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def matmul_rate(rows: int, columns: int, inner: int, device: str) -> float:
    """FLOP per second of torch.mm in float32, [rows, inner] x [inner, columns]: the best of some runs."""
    a, b = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
    out = torch.empty(rows, columns, device=device)
    best = min(measure(lambda: torch.mm(a, b, out=out), repeats=10, warmup=2, device=device).seconds)
    return 2.0 * rows * columns * inner / best


def write_rate(device: str, mib: int = 256) -> float:
    """Bytes per second of filling a large array: the best of some runs."""
    out = torch.empty(mib << 18, device=device)
    return out.numel() * 4 / min(measure(lambda: out.fill_(1.0), repeats=5, warmup=1, device=device).seconds)


def machine(device: str) -> dict[str, Any]:
    """What a row must tell about where and with what it was measured."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.startswith("cuda"):
        facts |= {"cuda": torch.version.cuda, "driver": _driver(), "triton": _triton()}
    return facts


def append_rows(name: str, rows: list[dict[str, Any]], device: str) -> Path:
    """Add rows to benchmarks/results/NAME.jsonl, each with the facts of `machine`."""
    path = RESULTS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = machine(device)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **facts}) + "\n" for row in rows)
    return path


def row(op: str, backend: str, shape: list[int], measured: Measurement, **more: Any) -> dict[str, Any]:
    """A row of results; seconds, bytes."""
    return {
        "op": op,
        "backend": backend,
        "shape": shape,
        "dtype": "float32",
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
        return "unknown"


def _driver() -> str | None:
    with contextlib.suppress(ImportError):
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            return str(pynvml.nvmlSystemGetDriverVersion())
    return None


def _triton() -> str | None:
    module = sys.modules.get("triton")
    return None if module is None else str(module.__version__)
