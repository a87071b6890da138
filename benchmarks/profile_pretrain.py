"""Where the time of a pre-training step goes: kernels, launches, copies, and how long the GPU waits for the host.

python benchmarks/profile_pretrain.py                          ViT-S, 128 images, kernels.backend=fused
python benchmarks/profile_pretrain.py --variant eager-ibot     another variant of bench_pretrain.py
python benchmarks/profile_pretrain.py --trace step.json.gz     keep the trace, for https://ui.perfetto.dev

Steps are those of bench_pretrain.py. Profiling slows the host down: the waiting is an upper bound, times of kernels are
right. Kernels that overlap on several streams count once in `busy`, each in their own line. Without a GPU: operators of
the recipe `demo` by their own CPU time. Prints only; rows of results come from bench_pretrain.py.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_pretrain
import harness
import torch
from torch.profiler import ProfilerActivity, profile

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of the trace that run on the GPU."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Calls in which the host waits for the GPU."""
NAME_WIDTH = 84


@dataclass(frozen=True)
class Summary:
    """A profile of some steps, per step; seconds."""

    wall: float
    busy: float
    """Something runs on the GPU, or an operator on the CPU."""
    launches: float
    copies: float
    waits: float
    lines: list[tuple[str, float, float]]
    """(name, calls, seconds), the longest first."""


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def summarise(events: list[dict[str, Any]], wall: float, steps: int, *, gpu: bool) -> Summary:
    """Sum up the events of a Chrome trace (`ts` and `dur` in microseconds).

    Args:
        events: `traceEvents`.
        wall: seconds of all steps by the clock of the host.
        steps: how many they are.
        gpu: count what ran there; else operators on the CPU, without the time of those they called.
    """
    done = [event for event in events if event.get("ph") == "X"]
    work = [event for event in done if event.get("cat") in (DEVICE_WORK if gpu else ("cpu_op",))]
    own = [event["dur"] for event in work] if gpu else own_times(work)
    lines: dict[str, list[float]] = {}
    for event, duration in zip(work, own, strict=True):
        line = lines.setdefault(event["name"], [0, 0.0])
        line[0] += 1
        line[1] += duration
    return Summary(
        wall=wall / steps,
        busy=1e-6 * busy_seconds((event["ts"], event["ts"] + event["dur"]) for event in work) / steps,
        launches=sum(event["cat"] == "kernel" for event in work) / steps,
        copies=sum(event["cat"] in ("gpu_memcpy", "gpu_memset") for event in work) / steps,
        waits=sum(event["name"] in WAITS for event in done) / steps,
        lines=sorted(
            ((name, calls / steps, 1e-6 * total / steps) for name, (calls, total) in lines.items()),
            key=lambda line: -line[2],
        ),
    )


def own_times(work: list[dict[str, Any]]) -> list[float]:
    """Duration of each event without that of the events inside it, on its own thread."""
    own = [event["dur"] for event in work]
    open_events: dict[Any, list[int]] = {}
    for index in sorted(range(len(work)), key=lambda i: (work[i]["ts"], -work[i]["dur"])):
        event = work[index]
        stack = open_events.setdefault(event.get("tid"), [])
        while stack and work[stack[-1]]["ts"] + work[stack[-1]]["dur"] <= event["ts"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= event["dur"]
        stack.append(index)
    return own


def record(worker: bench_pretrain.Worker, device: str, warmup: int, steps: int, trace: Path) -> float:
    """Profile some steps into a trace. Returns their seconds."""
    worker.time(warmup)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.startswith("cuda") else [])
    with profile(activities=kinds, acc_events=True) as profiler:
        begin = time.perf_counter()
        worker.steps(steps)
        harness.synchronise(device)
        seconds = time.perf_counter() - begin
    profiler.export_chrome_trace(str(trace))
    return seconds


def read_events(trace: Path) -> list[dict[str, Any]]:
    """`traceEvents` of a file, which may end in .gz."""
    opener = gzip.open if trace.suffix == ".gz" else open
    with opener(trace, "rt", encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def show(summary: Summary, top: int, *, gpu: bool) -> None:
    """Print the table."""
    print(f"step {1e3 * summary.wall:.2f} ms by the clock, of which busy {1e3 * summary.busy:.2f} ms", end="")
    print(f" ({100 * summary.busy / summary.wall:.1f} %)" if summary.wall else "")
    if gpu:
        print(
            f"{summary.launches:.0f} kernels, {summary.copies:.0f} copies and fills, "
            f"{summary.waits:.0f} waits of the host for the GPU, in a step"
        )
    total = sum(line[2] for line in summary.lines)
    print(f"\n{'calls':>7}{'us a step':>12}{'share':>8}  {'kernel' if gpu else 'operator'}")
    for name, calls, seconds in summary.lines[:top]:
        print(f"{calls:>7.1f}{1e6 * seconds:>12.1f}{seconds / total:>8.1%}  {name[:NAME_WIDTH]}")
    rest = summary.lines[top:]
    if rest:
        seconds = sum(line[2] for line in rest)
        print(f"{sum(line[1] for line in rest):>7.1f}{1e6 * seconds:>12.1f}{seconds / total:>8.1%}  {len(rest)} others")


def main() -> None:
    """Record, sum up, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="fused", choices=bench_pretrain.VARIANTS)
    parser.add_argument("--recipe", help="default: vit_small_luperson, without a GPU demo")
    parser.add_argument("--images", type=int, help="default: 128, without a GPU 64")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--top", type=int, default=40, help="lines of the table (default %(default)s)")
    parser.add_argument("--trace", type=Path, help="keep the trace in this new file (.json or .json.gz)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.trace is not None and options.trace.exists():
        parser.error(f"--trace {options.trace} exists: nothing is overwritten, name another file")
    gpu = options.device.startswith("cuda")
    recipe = options.recipe or ("vit_small_luperson" if gpu else "demo")
    images = options.images or (128 if gpu else 64)
    harness.announce(options.device)
    worker = bench_pretrain.Worker(options.variant, bench_pretrain.Case(recipe, images, options.device), options.seed)
    with tempfile.TemporaryDirectory() as folder:
        trace = options.trace or Path(folder, "trace.json")
        wall = record(worker, options.device, 5 if gpu else 1, options.steps, trace)
        summary = summarise(read_events(trace), wall, options.steps, gpu=gpu)
    print(f"\n{options.variant}, {recipe}, {images} images, mean of {options.steps} steps")
    show(summary, options.top, gpu=gpu)
    if options.trace is not None:
        print(f"\ntrace in {options.trace}")


if __name__ == "__main__":
    main()
