"""Launch parameters of the Triton kernels, tried by measurement, so that the best can be frozen in the kernels' tables.

python benchmarks/tune.py                          on a GPU: all settings, most important first, 9 minutes at most
python benchmarks/tune.py --kernels attention adamw --match backward
python benchmarks/tune.py --dry-run                what would be tried
python benchmarks/tune.py --compile                compile it all for sm_90: registers, spills, shared memory; no GPU

Each setting (an entry of a table, or some constants of a module) is measured with a cold L2 cache: as shipped, then
every candidate, then as shipped again; the difference of the two is the noise. A candidate that does not compile, does
not fit, or errs more than twice as much as plain torch against float64 is left out with its reason. At the end stands
what to freeze: the best of a setting, if over all its calls it gains more than the noise, and loses more on none.
Nothing is tuned at run time: tables stay as they are until somebody edits them. Rows are appended to
benchmarks/results/tuning.jsonl. Leaves with 1 if a shipped configuration does not run or is wrong.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import bench_attention
import harness
import torch
from torch import Tensor
from tune_grids import GROUPS, SETTINGS
from tune_plan import IMAGES, Conditions, Configuration, Plan, Setting, Work
from tune_results import (
    Outcome,
    Trial,
    Usage,
    left_out,
    obstacle,
    resources_text,
    result_rows,
    show,
    summary,
    taken,
    text,
)

from personvit import ops
from personvit.kernels import aot

SM = 90
SPIN_CYCLES = 4_000_000
"""Two milliseconds, by which the host is ahead of the device: to launch the update of a whole model takes it one."""


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a kernel forgets to write is NaN."""

    def poison(make: Any) -> Any:
        def made(*args: Any, **options: Any) -> Tensor:
            tensor: Tensor = make(*args, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    with (
        patch.object(torch, "empty", poison(torch.empty)),
        patch.object(torch, "empty_like", poison(torch.empty_like)),
        patch.object(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty)),
    ):
        yield


def attempt(setting: Setting, values: Configuration, work: Work, device: str) -> Trial:
    """Check a configuration, then measure it. Whatever stops it is its reason."""
    try:
        with setting.place.swapped(values):
            with poisoned():
                results = work.results()
            wrong = work.fault(results)
            del results
            if wrong is not None:
                return Trial(values, None, f"wrong: {wrong}")
            return Trial(values, harness.measure_device(work.run, device, cold=True, spin_cycles=SPIN_CYCLES))
    except Exception as error:  # out of registers or shared memory, not compiled: Triton has a type for each
        first = (str(error).splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first}"
    try:
        harness.synchronise(device)
    except RuntimeError as error:
        raise SystemExit(
            f"{setting.name}, {text(values)}: {reason}. The device takes no more work in this process ({error}). Rows "
            "of the settings before are kept. Take the configuration out of tune_grids.py, go on with --match"
        ) from error
    return Trial(values, None, reason)


def explore(setting: Setting, plan: Plan, at: Conditions, deadline: float) -> Outcome:
    """Measure a setting on one call: as shipped, the candidates until time is up, as shipped."""
    outcome = Outcome(plan.title)
    shipped, *others = setting.candidates()
    try:
        work = plan.make(at)
    except Exception as error:  # as in `attempt`: the shipped configuration makes what a backward starts from
        outcome.trials.append(Trial(shipped, None, f"{type(error).__name__}: {error}"))
        return outcome
    outcome.facts = {"shape": work.shape, "dtype": work.dtype, "floor_s": work.floor_s}
    outcome.trials.append(attempt(setting, shipped, work, at.device))
    if outcome.trials[0].measured is None:
        return outcome
    outcome.shipped.append(outcome.trials[0].measured)
    for values in others:
        if time.monotonic() > deadline:
            break
        outcome.trials.append(attempt(setting, values, work, at.device))
    last = attempt(setting, shipped, work, at.device)
    if last.measured is not None:
        outcome.shipped.append(last.measured)
    return outcome


def compiled(name: str, number: int, sm: int) -> list[dict[str, Any]]:
    """What the kernels of a candidate take, a row each; with `error` where one does not compile."""
    setting = next(setting for setting in SETTINGS if setting.name == name)
    values = setting.candidates()[number]
    builds = {build.name: build for plan in setting.plans for build in setting.builds(values, plan)}
    found = []
    for build in builds.values():
        try:
            found.append(aot.usage(build, sm))
        except Exception as error:  # of many types, some of them MLIR's
            found.append({"name": build.name, "error": f"{type(error).__name__}: {str(error)[:200]}"})
    return found


def compile_all(settings: Sequence[Setting], sm: int) -> Usage:
    """Compile every candidate on all cores. Triton keeps the results, so that launching them takes no time later."""
    jobs = [(setting.name, number) for setting in settings for number in range(len(setting.candidates()))]
    context = multiprocessing.get_context("spawn")  # a fork would share the parent's CUDA context
    with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count() or 1, len(jobs)), context) as pool:
        futures = [pool.submit(compiled, *job, sm) for job in jobs]
        return {job: future.result() for job, future in zip(jobs, futures, strict=True)}


def tune(settings: Sequence[Setting], device: str, seconds: float) -> int:
    """Measure on a GPU, print, append rows. Returns 1 if a shipped configuration fails."""
    deadline = time.monotonic() + seconds
    ops.set_backend("triton")
    harness.announce(device)
    major, minor = torch.cuda.get_device_capability(device)
    usage = compile_all(settings, 10 * major + minor)
    size = 8192
    flops = harness.matmul_rate(size, size, size, device, dtype=torch.bfloat16)
    at = Conditions(device, torch.bfloat16, IMAGES, bench_attention.Rates(harness.copy_rate(device), flops))
    print(f"compiled in {time.monotonic() + seconds - deadline:.0f} s; copying here {at.rates.bytes / 1e9:.0f} GB/s")
    results: list[tuple[Setting, list[Outcome]]] = []
    for setting in settings:
        outcomes: list[Outcome] = []
        results.append((setting, outcomes))
        found: list[dict[str, Any]] = []
        for plan in setting.plans:
            late = time.monotonic() > deadline
            outcomes.append(Outcome(plan.title) if late else explore(setting, plan, at, deadline))
            if not late:
                show(setting, plan, outcomes[-1], usage)
            found += result_rows(setting, plan, outcomes[-1], usage, at.rates.bytes)
        if found:  # after each setting: a run that is cut off keeps what it has
            harness.append_rows("tuning", found, device)
    print("\n".join([*summary(results), *left_out(results)]))
    return int(any(o.trials and o.trials[0].measured is None for _, outcomes in results for o in outcomes))


def list_candidates(settings: Sequence[Setting], usage: Usage | None = None) -> int:
    """Print what would be tried and, if known, what it takes. Returns 1 if something does not belong in a grid."""
    bad = 0
    for setting in settings:
        print(f"\n{setting.name}: {setting.place.text} in {setting.file}")
        print("  on " + "; ".join(plan.title for plan in setting.plans))
        for number, values in enumerate(setting.candidates()):
            mark = "  shipped" if number == 0 else ""
            if usage is None:
                print(f"  {text(values)}{mark}")
                continue
            reason = obstacle(usage[setting.name, number])
            bad += bool(reason)
            resources = resources_text(taken(usage, setting, number))
            print(f"  {text(values):<52}{resources}{mark}{'  ' if reason else ''}{reason}")
    count = sum(len(setting.candidates()) for setting in settings)
    print(f"\n{len(settings)} settings, {count} configurations" + (f", {bad} of them unfit" if usage else ""))
    return int(bad > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--match", default="", help="only settings whose name contains this")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing new after this time (default 540)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="list settings, calls and candidates")
    parser.add_argument("--compile", action="store_true", help=f"what every candidate takes on sm_{SM}; needs no GPU")
    options = parser.parse_args()
    settings = [s for s in SETTINGS if s.group in options.kernels and options.match in s.name]
    if not settings:
        parser.error(f"--match {options.match}: no such setting; --dry-run lists them")
    if options.dry_run:
        return list_candidates(settings)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels are interpreted then, not compiled. Unset it.")
    if options.compile:
        print("configuration, registers a thread, spill instructions, bytes of shared memory")
        return list_candidates(settings, compile_all(settings, SM))
    if not torch.cuda.is_available():
        parser.error(
            "torch.cuda.is_available() is False: launch parameters are measured on a CUDA device. "
            "python -m personvit.env says why there is none; without one: --dry-run, --compile"
        )
    return tune(settings, options.device, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
