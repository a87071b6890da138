"""Re-ranking and ranking metrics against the published algorithms in numpy, side by side in one run.

python benchmarks/bench_retrieval.py            the table: Market-1501 and MSMT17 scale (minutes)
python benchmarks/bench_retrieval.py --quick    a smoke test in seconds; its figures say nothing about large sets
python benchmarks/bench_retrieval.py --curve    how the cost grows from 5,000 to 90,000 images (minutes)

Features are generated: unit vectors in clusters, 384 wide, several images of every identity. Rows are appended to
benchmarks/results/retrieval.jsonl, with --quick to retrieval_quick.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the references lie with the tests

import harness
from helpers.metrics_numpy import rank_metrics_numpy
from helpers.rerank_numpy import rerank_numpy

from personvit import ops
from personvit.config import RERANK_PRESETS
from personvit.retrieval import FeatureSet, evaluate_features, pairwise_distance, rank_metrics, rerank

WIDTH = 384
GIB = 2**30


class Scale(NamedTuple):
    """Size of a set."""

    queries: int
    gallery: int
    ids: int
    cameras: int


SCALES = {
    "quick": Scale(200, 1000, 60, 4),
    "5k": Scale(700, 4300, 240, 6),
    "market": Scale(3368, 15913, 750, 6),
    "msmt17": Scale(11659, 82161, 3060, 15),
}
CURVE = (5_000, 10_000, 20_000, 40_000, 90_000)
CURVE_QUERIES = 1000  # the same at each size, so that only the search of all among all may grow as a square


@dataclass(frozen=True)
class Goal:
    """What a row must reach on two CPU cores, and what it should reach for: seconds and GiB above the inputs."""

    must: tuple[float, float | None]
    reach: tuple[float, float | None]


GOALS = {
    ("rerank 20/6/0.3", "market"): Goal((4.0, 1.0), (2.5, 0.5)),
    ("rerank 50/15/0.3", "market"): Goal((8.0, None), (4.0, None)),
    ("rerank 20/6/0.3 top 100", "msmt17"): Goal((100.0, 3.0), (60.0, 2.0)),
    ("rank_metrics", "market"): Goal((0.25, None), (0.1, None)),
    ("rank_metrics streamed", "msmt17"): Goal((10.0, 2.0), (6.0, 1.0)),
}


class Data(NamedTuple):
    """A generated set."""

    query: FeatureSet
    gallery: FeatureSet

    @property
    def labels(self) -> tuple[np.ndarray, ...]:
        """Identities and cameras as `rank_metrics` takes them."""
        return self.query.pids, self.gallery.pids, self.query.camids, self.gallery.camids


def generate(scale: Scale, seed: int, device: str) -> Data:
    """Unit features: identities lie in a space of 32 dimensions, images scatter around them, cameras shift them."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((32, WIDTH)) / math.sqrt(32)
    centres = (rng.standard_normal((scale.ids, 32)) @ latent).astype(np.float32)
    shifts = rng.standard_normal((scale.cameras, WIDTH)).astype(np.float32)

    def split(count: int) -> FeatureSet:
        pids, camids = np.arange(count) % scale.ids, rng.integers(0, scale.cameras, count)
        scatter = rng.standard_normal((count, WIDTH), dtype=np.float32)
        features = torch.from_numpy(centres[pids] + 0.5 * shifts[camids] + 1.6 * scatter).to(device)
        return FeatureSet(F.normalize(features, dim=1), pids, camids, [""] * count)

    return Data(split(scale.queries), split(scale.gallery))


def check_parity(device: str) -> None:
    """Stop unless the fast code agrees with the references: a wrong result is not worth a measurement."""
    data = generate(SCALES["quick"], 1, device)
    query, gallery = data.query.features, data.gallery.features
    for values in ((20, 6, 0.3), (50, 15, 0.3)):
        wanted = rerank_numpy(query.cpu().numpy(), gallery.cpu().numpy(), *values)
        difference = np.abs(rerank(query, gallery, *values).cpu().numpy() - wanted)
        # A distance that rounding moved over the edge of a neighbourhood changes a few rows; nothing else may differ.
        if np.quantile(difference, 0.995) > 2e-6:
            raise SystemExit(f"parity: rerank {values} is {difference.max():.1e} off the numpy reference")
    distmat = pairwise_distance(query, gallery)
    result = rank_metrics(distmat, *data.labels)
    expected = rank_metrics_numpy(distmat.cpu().numpy(), *data.labels)
    if not np.allclose((result.mAP, result.rank(1), result.mINP), expected, rtol=0, atol=1e-7):
        raise SystemExit(f"parity: rank_metrics gives {result.mAP} for mAP, the numpy reference {expected[0]}")
    print("parity with the numpy references: good")


class Table:
    """Prints the rows as they come, and keeps them for the file of results."""

    def __init__(self, device: str, gemm_rate: float, write_rate: float) -> None:
        self.device = device
        self.gemm_rate = gemm_rate
        self.write_rate = write_rate
        self.rows: list[dict[str, Any]] = []
        print(
            f"torch.mm here {gemm_rate / 1e9:.0f} GFLOP/s, writing {write_rate / 1e9:.1f} GB/s; "
            f"{torch.get_num_threads()} threads; floor: products at that rate and the result written once\n\n"
            f"{'work':<26}{'scale':<10}{'numpy':>10} {'GiB':>9} {'ours':>10} {'GiB':>9} "
            f"{'ratio':>7} {'floor':>10} {'share':>6}  goal"
        )

    def add(
        self,
        work: str,
        scale_name: str,
        scale: Scale,
        ours: harness.Measurement,
        numpy: harness.Measurement | None,
        floor: float,
    ) -> None:
        """One line; the baseline and ours become rows of results."""
        goal = GOALS.get((work, scale_name)) if self.device == "cpu" else None
        ratio = "" if numpy is None else f"{numpy.at(50) / ours.at(50):.1f}x"
        print(
            f"{work:<26}{scale_name:<10}{'' if numpy is None else numpy.text():>20} {ours.text()} {ratio:>7} "
            f"{harness.seconds_text(floor):>10} {100 * floor / ours.at(50):5.0f}%  {verdict(goal, ours)}",
            flush=True,
        )
        shape = [scale.queries, scale.gallery, WIDTH]
        more: dict[str, Any] = {"scale": scale_name, "floor_s": floor, "gemm_flops": self.gemm_rate}
        if goal is not None:
            more |= {"must": goal.must, "reach": goal.reach}
        if numpy is not None:
            self.rows.append(harness.row(work, "numpy", shape, numpy, **more))
        operator = "rank_counts" if work.startswith("rank_metrics") else "knn"
        self.rows.append(harness.row(work, backend_of(operator, self.device), shape, ours, **more))

    def floor(self, products: float, written: float) -> float:
        """Seconds for some products [FLOP] and a result of some bytes, as if nothing else were to be done.

        The rate of products is the best seen so far: measured anew after each row, since other work slows a moment.
        """
        self.gemm_rate = max(self.gemm_rate, gemm_rate(self.device))
        return products / self.gemm_rate + written / self.write_rate


def gemm_rate(device: str) -> float:
    """FLOP per second of torch.mm on a tile of distances."""
    return harness.matmul_rate(1024, 4096, WIDTH, device)


def backend_of(operator: str, device: str) -> str:
    """Which implementation of an operator runs on a device."""
    return next(row.backend for row in ops.report(device) if row.op == operator)


def verdict(goal: Goal | None, ours: harness.Measurement) -> str:
    """Whether a goal was met, in words."""
    if goal is None:
        return ""

    def met(limits: tuple[float, float | None]) -> bool:
        seconds, gib = limits
        return ours.at(50) <= seconds and (gib is None or (ours.peak_bytes or 0) <= gib * GIB)

    def text(limits: tuple[float, float | None]) -> str:
        return f"{limits[0]:g} s" + ("" if limits[1] is None else f", {limits[1]:g} GiB")

    word = "reached" if met(goal.reach) else "met" if met(goal.must) else "MISSED"
    return f"{word} (must {text(goal.must)}; reach {text(goal.reach)})"


def rerank_rows(table: Table, name: str, options: argparse.Namespace) -> None:
    scale = SCALES[name]
    data = generate(scale, options.seed, options.device)
    query, gallery = data.query.features, data.gallery.features
    top = 100 if name == "msmt17" else None
    repeats = 1 if name == "msmt17" else 3
    total = scale.queries + scale.gallery
    products = 2.0 * WIDTH * (total * total / 2 + scale.queries * scale.gallery)  # a pair of images once
    written = scale.queries * (scale.gallery * 4 if top is None else top * 12)
    for values in ((20, 6, 0.3), (50, 15, 0.3)):
        if top is not None and values != (20, 6, 0.3):
            continue
        work = "rerank {}/{}/{:g}".format(*values) + (f" top {top}" if top else "")
        ours = harness.measure(
            functools.partial(rerank, query, gallery, *values, top=top),
            repeats=repeats,
            warmup=0 if name == "msmt17" else 1,
            device=options.device,
        )
        baseline = None
        if options.baseline and name != "msmt17":  # there a single matrix of the reference would take 33 GiB
            published = functools.partial(
                rerank_numpy, query.cpu().numpy(), gallery.cpu().numpy(), *values, kind="quicksort"
            )
            baseline = harness.measure(published, repeats=1, warmup=0)
        table.add(work, name, scale, ours, baseline, table.floor(products, written))


def metric_rows(table: Table, name: str, options: argparse.Namespace) -> None:
    scale = SCALES[name]
    data = generate(scale, options.seed, options.device)
    entries = scale.queries * scale.gallery
    if name == "msmt17":
        ours = harness.measure(lambda: evaluate_features(*data), repeats=1, warmup=0, device=options.device)
        table.add("rank_metrics streamed", name, scale, ours, None, table.floor(2.0 * WIDTH * entries, 4.0 * entries))
        if options.device == "cpu":  # the matrix would take 3.6 GiB, for what streaming does in less
            return
    distmat = pairwise_distance(data.query.features, data.gallery.features)
    ours = harness.measure(lambda: rank_metrics(distmat, *data.labels), repeats=5, device=options.device)
    baseline = None
    if options.baseline and name != "msmt17":
        matrix = distmat.cpu().numpy()
        baseline = harness.measure(
            lambda: rank_metrics_numpy(matrix, *data.labels, kind="quicksort"), repeats=1, warmup=0
        )
    table.add("rank_metrics", name, scale, ours, baseline, 4.0 * entries / table.write_rate)


def curve(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of every stage at growing sizes, and the exponent of each between neighbouring sizes."""
    sizes = [500, 1000, 2000] if options.quick else options.sizes
    queries = min(CURVE_QUERIES, min(sizes) // 5)
    rows: list[dict[str, Any]] = []
    before: dict[str, float] = {}
    previous = 0
    print(f"\nstages of rerank 20/6/0.3, {queries:,} queries: time, and growth with the images N since the line before")
    for size in sizes:
        scale = Scale(queries, size - queries, max(10, size // 26), 6)
        seconds, entries = stage_seconds(generate(scale, options.seed, options.device), options.device)
        if not rows:
            print(f"{'images':>8}" + "".join(f"{stage:>22}" for stage in seconds) + f"{'entries an image':>20}")
        line = f"{size:>8,}"
        for stage, value in seconds.items():
            growth = f"N^{math.log(value / before[stage]) / math.log(size / previous):.2f}" if before else ""
            line += f"{harness.seconds_text(value):>14}{growth:>8}"
            measured = harness.Measurement((value,), None)
            shape = [scale.queries, scale.gallery, WIDTH]
            more = {"entries_per_image": entries}
            rows.append(harness.row(f"curve {stage}", backend_of("knn", options.device), shape, measured, **more))
        print(f"{line}{entries[0]:>12.1f} {entries[1]:.1f}", flush=True)
        before, previous = seconds, size
    return rows


def stage_seconds(data: Data, device: str) -> tuple[dict[str, float], tuple[float, float]]:
    """Seconds of each stage of rerank 20/6/0.3 with lists of 100, and of the metrics from features.

    With them the work of the stages of sets: entries of an encoding before and after query expansion. The median of
    three; the search of all among all, which takes most of the time, runs once.
    """
    seconds = {}

    def timed(stage: str, work: Callable[[], Any], repeats: int = 3) -> Any:
        laps = []
        for _ in range(repeats):
            begin = time.perf_counter()
            result = work()
            harness.synchronise(device)
            laps.append(time.perf_counter() - begin)
        seconds[stage] = float(np.median(laps))
        return result

    k1, k2, lambda_value = RERANK_PRESETS["zhong2017"]
    query, gallery = data.query.features, data.gallery.features
    points = torch.cat([query, gallery])
    _, neighbours, row_max = timed("neighbours", lambda: ops.nearest(points, points, k1 + 1), repeats=1)
    sets = timed("reciprocal sets", lambda: ops.k_reciprocal(neighbours, k1))
    weights = timed("weights", lambda: ops.reciprocal_weights(points, row_max, *sets))
    expanded = timed("query expansion", lambda: ops.query_expansion(*sets, weights, neighbours, k2))
    encoding = ops.encode(query, gallery, k1, k2)
    timed(
        "distances, best 100",
        lambda: ops.rerank_block_lists(query, gallery, encoding, lambda_value, 0, len(query), 100),
    )
    timed("metrics streamed", lambda: evaluate_features(*data))
    return seconds, (len(sets[1]) / len(points), len(expanded[1]) / len(points))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds")
    parser.add_argument("--curve", action="store_true", help="the growth curve instead of the table")
    parser.add_argument("--sizes", type=int, nargs="+", default=CURVE, help="images of the curve (default %(default)s)")
    parser.add_argument("--scales", default="5k,market,msmt17", help=f"of {', '.join(SCALES)} (default %(default)s)")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false", help="leave the numpy references out")
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    names = ["quick"] if options.quick else options.scales.split(",")
    unknown = [name for name in names if name not in SCALES]
    if unknown:
        parser.error(f"--scales {','.join(unknown)}: expected some of {', '.join(SCALES)}")
    if options.quick:
        print("--quick: a smoke test at a size where fixed costs rule. No figure below speaks for a real set.")
    check_parity(options.device)
    if options.curve:
        rows = curve(options)
    else:
        table = Table(options.device, gemm_rate(options.device), harness.write_rate(options.device))
        work: tuple[Callable[[Table, str, argparse.Namespace], None], ...] = (rerank_rows, metric_rows)
        for rows_of in work:
            for name in names:
                rows_of(table, name, options)
        rows = table.rows
    path = harness.append_rows("retrieval_quick" if options.quick else "retrieval", rows, options.device)
    print(f"\n{len(rows)} rows appended to {path.relative_to(harness.ROOT)}")


if __name__ == "__main__":
    main()
