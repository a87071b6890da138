"""Write docs/benchmarks.md from benchmarks/results, so that no figure there is ever typed.

python benchmarks/tables.py            write it
python benchmarks/tables.py --check    leave with 1 if it is not what the rows say

Of rows about the same thing on the same device the latest counts. A commit marked "-changed" had edits on top.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import goals

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

Row = dict[str, Any]

INTRODUCTION = """# Benchmarks

Written by `python benchmarks/tables.py` from the rows in `benchmarks/results/`; each row also holds quantiles, versions
and the commit it was measured at. `make bench` runs every benchmark on what a machine has, `make bench-gpu` insists on
a GPU.

The floor of a benchmark is the time that the bytes and products which cannot be avoided would take at the rates of
`copy` and `matmul` measured on the same machine in the same run. Baselines are described at the top of each script.
"""
KIND = (
    *("op", "backend", "shape", "dtype", "scale", "recipe", "model", "cold", "source", "workers", "device"),
    *("decode", "hw_decoder_load"),
)
GOALS = """
## Goals on a GPU

Set before anything had run on one, from the bytes and products of each piece of work (`benchmarks/goals.py`); attention
is that of one layer of ViT-S, 128 images, cold cache.
"""
NOT_MEASURED = "**Not measured: no GPU was at hand.** `make bench-gpu` on a machine that has one adds the rows.\n"


@dataclass(frozen=True)
class Section:
    """A file of results and how to show it."""

    title: str
    file: str
    script: str
    about: str
    table: Callable[[list[Row]], Iterable[str]]


def load(name: str) -> list[Row]:
    """The rows of a file, of each kind the latest; [] where there is no such file."""
    path = RESULTS / name
    if not path.is_file():
        return []
    latest: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kind = [row.get(key) for key in KIND]
        latest[json.dumps(kind)] = row  # later lines are newer
    return list(latest.values())


def time_text(seconds: float) -> str:
    """Three digits with the unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def grid(head: list[str], lines: Iterable[list[str]]) -> Iterable[str]:
    """A Markdown table, numbers to the right."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("---" if number == 0 else "--:" for number in range(len(head))) + "|"
    for line in lines:
        yield "| " + " | ".join(line) + " |"


def gib(row: Row) -> str:
    """Peak memory of a row."""
    return "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**30:.2f}"


def groups_of(rows: list[Row], *keys: str) -> dict[str, list[Row]]:
    """Rows with the same values of `keys`, in the order of their first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row.get(key) for key in keys]), []).append(row)
    return groups


def retrieval(rows: list[Row]) -> Iterable[str]:
    """Work against the published algorithm in numpy."""

    def lines() -> Iterable[list[str]]:
        plain = [row for row in rows if not row["op"].startswith("curve")]
        for group in groups_of(plain, "op", "scale", "shape").values():
            ours = next(row for row in group if row["backend"] != "numpy")
            numpy = next((row for row in group if row["backend"] == "numpy"), None)
            goal = "" if "must" not in ours else f"{ours['must'][0]:g} s / {ours['reach'][0]:g} s"
            yield [
                f"{ours['op']}, {ours['shape'][0]:,} x {ours['shape'][1]:,}",
                "" if numpy is None else time_text(numpy["p50"]),
                "" if numpy is None else gib(numpy),
                time_text(ours["p50"]),
                gib(ours),
                "" if numpy is None else f"{numpy['p50'] / ours['p50']:.1f}x",
                f"{100 * ours['floor_s'] / ours['p50']:.0f} %",
                goal,
                ours["commit"],
            ]

    head = ["work, queries x gallery", "numpy", "GiB", "ours", "GiB", "ratio", "of floor", "must / reach", "commit"]
    yield from grid(head, lines())


def curve(rows: list[Row]) -> Iterable[str]:
    """Growth of the stages of re-ranking; exponents between neighbouring sizes."""
    rows = [row for row in rows if row["op"].startswith("curve") and "entries_per_image" in row]
    stages = {row["op"].removeprefix("curve "): None for row in rows}
    entries = {sum(row["shape"][:2]): row["entries_per_image"] for row in rows}
    sizes = sorted(entries)
    found = {(row["op"].removeprefix("curve "), sum(row["shape"][:2])): row["p50"] for row in rows}

    def lines() -> Iterable[list[str]]:
        for before, size in zip([None, *sizes], sizes, strict=False):
            line = [f"{size:,}"]
            for stage in stages:
                growth = ""
                if before is not None:
                    exponent = math.log(found[stage, size] / found[stage, before]) / math.log(size / before)
                    growth = f" (N^{exponent:.2f})"
                line.append(time_text(found[stage, size]) + growth)
            yield [*line, " to ".join(f"{count:.0f}" for count in entries[size])]

    yield from grid(["images N", *stages, "entries"], lines())


def step(rows: list[Row]) -> Iterable[str]:
    """Variants of the pre-training step."""
    gpu = any(row.get("mfu") is not None for row in rows)
    for group in groups_of(rows, "recipe", "shape", "dtype").values():
        first = group[0]
        yield (
            f"{first['recipe']}, {first['shape'][0]} images, {first['dtype']}, "
            f"{first['flops_per_image'] / 1e9:.3g} GFLOP an image (commit {first['commit']}):\n"
        )

        def lines(group: list[Row] = group) -> Iterable[list[str]]:
            for row in group:
                line = [row["backend"], f"{row['images_per_s']:.4g}", time_text(row["p50"])]
                line += ["" if row["ratio"] is None else f"{row['ratio']:.2f}x", gib(row), f"{row['loss']:.4f}"]
                if gpu:
                    line += [f"{100 * row['mfu']:.1f} %", f"{row.get('joules_per_image') or float('nan'):.3g}"]
                yield line

        head = ["variant", "images/s", "step", "to eager-ibot", "GiB", "loss"]
        yield from grid(head + (["MFU", "J/image"] if gpu else []), lines())
        yield ""


def kernels(rows: list[Row]) -> Iterable[str]:
    """Backends of an operator side by side."""

    def lines() -> Iterable[list[str]]:
        for group in groups_of(rows, "op", "model", "shape", "dtype", "cold").values():
            eager = next((row for row in group if row["backend"] == "eager"), None)
            for row in group:
                cache = "cold" if row.get("cold") else "warm"
                yield [
                    " ".join(filter(None, [row["op"], row.get("model")])),
                    "x".join(map(str, row["shape"])),
                    row["dtype"],
                    cache,
                    row["backend"],
                    time_text(row["p50"]),
                    "" if eager is None else f"{eager['p50'] / row['p50']:.2f}x",
                    f"{100 * row['floor_s'] / row['p50']:.0f} %",
                    row["commit"],
                ]

    head = ["operator", "shape", "dtype", "cache", "backend", "median", "to eager", "of floor", "commit"]
    yield from grid(head, lines())


def rates(rows: list[Row]) -> Iterable[str]:
    """Images of a second."""

    def lines() -> Iterable[list[str]]:
        for row in rows:
            name = row["op"] if row["backend"] in row["op"] else f"{row['op']} ({row['backend']})"
            yield [name, f"{row['shape'][0]:,}", time_text(row["p50"]), f"{row['per_s']:,.0f}", gib(row), row["commit"]]

    yield from grid(["work", "images", "median", "images/s", "GiB", "commit"], lines())


def loading(rows: list[Row]) -> Iterable[str]:
    """Loaders beside torchvision's."""

    def lines() -> Iterable[list[str]]:
        for group in groups_of(rows, "recipe", "source", "workers").values():
            base = next((row for row in group if row["backend"] == "torchvision"), None)
            for row in group:
                mixed = f", nvJPEG {row['hw_decoder_load']:g}" if row["decode"] == "mixed" else ""
                waits = row["data_wait"] is not None and row.get("step") is not None
                yield [
                    f"{row['backend']}, {row['workers']} workers or threads{mixed}",
                    f"{row['recipe']} ({row['shape'][1]})",
                    row["source"],
                    f"{row['images_per_s']:,.0f}",
                    f"{row['crops_per_s']:,.0f}",
                    "" if base is None else f"{row['images_per_s'] / base['images_per_s']:.2f}x",
                    f"{row['step_ms']:.0f} ms ({row['step']})" if waits else "",
                    f"{100 * row['data_wait']:.1f} %" if waits else "",
                    row["commit"],
                ]

    head = ["loader", "recipe (crops)", "images of", "images/s", "crops/s", "to torchvision", "step", "waits", "commit"]
    yield from grid(head, lines())


SECTIONS = (
    Section(
        "Retrieval",
        "retrieval.jsonl",
        "bench_retrieval.py",
        "Re-ranking (k1/k2/lambda) and metrics; GiB are above the inputs. numpy is the published algorithm.",
        retrieval,
    ),
    Section(
        "Growth of re-ranking",
        "retrieval.jsonl",
        "bench_retrieval.py --curve",
        "Stages for a fixed number of queries. Only the search of all images among all may grow as N^2.\n"
        "The stages of sets do a fixed amount of work for an image, in proportion to the entries of its encoding\n"
        "(last column: before and after query expansion), at places all over tables that grow with N.",
        curve,
    ),
    Section(
        "Image sources",
        "sources.jsonl",
        "bench_sources.py",
        "Generated JPEGs of 64x128 pixels; GiB are above the start.",
        rates,
    ),
    Section(
        "Loading",
        "data.jsonl",
        "bench_data.py",
        "From JPEG files to normalised float32 crops, loaders in turns; vit_small_luperson: 2 crops of 256x128 and 8\n"
        "of 128x64 of each image. The last columns: how long a step takes beside the loader, and the share of it in\n"
        "which it waits for its batch (`--train`: real steps, which on a CPU share the cores with the loader).",
        loading,
    ),
    Section(
        "Pre-training step on a CPU",
        "pretrain_cpu.jsonl",
        "bench_pretrain.py",
        "The whole step (forward, losses, backward, clipping, AdamW, moving average), same weights and crops.",
        step,
    ),
    Section("Pre-training step on a GPU", "pretrain.jsonl", "bench_pretrain.py", "As above; MFU of 989 TFLOP/s.", step),
    Section("Attention", "attention.jsonl", "bench_attention.py", "Packed queries, keys, values.", kernels),
    Section("Tokens and norms", "tokens.jsonl", "bench_tokens.py", "Assembly, sum with norm, gather.", kernels),
    Section("Losses", "losses.jsonl", "bench_losses.py", "Distillation cross-entropy.", kernels),
)


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for section in SECTIONS:
        parts.append(f"\n## {section.title}\n\n`python benchmarks/{section.script}`. {section.about}\n")
        rows = load(section.file)
        if not rows:
            parts.append(f"\n{NOT_MEASURED}")
        for group in groups_of(rows, "device").values():
            threads = "" if group[0].get("cuda") else f", {group[0]['threads']} threads"
            parts.append(f"\n{group[0]['device']}{threads}:\n\n" + "\n".join(section.table(group)).rstrip("\n") + "\n")
    parts.append(GOALS)
    rows_by_device: dict[str, goals.Results] = {}
    for name in goals.FILES:
        for row in load(name):
            if row.get("cuda"):
                rows_by_device.setdefault(row["device"], {}).setdefault(name, []).append(row)
    if not rows_by_device:
        parts.append(f"\n{NOT_MEASURED}")
    for device, results in rows_by_device.items() or [("", {})]:
        table = grid(["goal", "must", "reach", "measured", ""], goals.lines(results))
        parts.append(f"\n{device + ':' if device else 'The goals:'}\n\n" + "\n".join(table) + "\n")
    return "".join(parts)


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args()
    text = page()
    if options.check:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE.relative_to(ROOT)} is not what benchmarks/results says: run python benchmarks/tables.py")
        return 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
