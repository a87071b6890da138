"""Checking, packing and reading of image sources, on generated persons of 64 x 128 pixels.

python benchmarks/bench_sources.py            20,000 images, a list of 4.18 million paths (LUPerson's size): minutes
python benchmarks/bench_sources.py --quick    a smoke test in seconds; its figures say little

Files are written to a temporary folder first, so that all reads come from the page cache: these are the costs of the
program, not of a disk. Rows are appended to benchmarks/results/sources.jsonl, with --quick to sources_quick.jsonl.
"""

from __future__ import annotations

import argparse
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import lmdb
import numpy as np
from PIL import Image

from personvit.data.check import scan
from personvit.data.generated.config import GeneratedConfig
from personvit.data.generated.dataset import generate
from personvit.data.lmdb_source import LmdbSource
from personvit.data.pack import pack
from personvit.data.parallel import worker_count
from personvit.data.path_sources import FolderSource, ListSource
from personvit.data.shards import ShardSource
from personvit.data.sources import ImageSource

LUPERSON = 4_180_243
RENDERED = 500
QUICK = 40  # times fewer
GOALS = {"pack": 5000, "pack, decode-verified": 5000, "check": 1500, "lmdb read": 20_000}  # per second


def write_images(root: Path, count: int) -> Path:
    """`count` JPEG files in folders of 1,000: rendered persons, each with its own noise, so that no two are alike."""
    generate(root / "rendered", GeneratedConfig(pool_images=RENDERED, train_ids=2, test_ids=2), progress=False)
    rendered = [
        np.asarray(Image.open(file).resize((64, 128))) for file in sorted((root / "rendered/pool").glob("*.jpg"))
    ]
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / "images" / f"{number // 1000:04}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rendered[number % len(rendered)] + rng.integers(-3, 4, (128, 64, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:08}.jpg", quality=85)
    return root / "images"


def write_lmdb(root: Path, source: ImageSource) -> Path:
    """The same images as LUPerson has them: raw files under keys of its form."""
    keys = [f"00_00_{number // 1000:04}_{number % 1000:08}" for number in range(len(source))]
    environment = lmdb.open(str(root / "lmdb"), map_size=1 << 34)
    with environment.begin(write=True) as transaction:
        for number, key in enumerate(keys):
            transaction.put(key.encode(), source.read(number))
    environment.close()
    (root / "keys.pkl").write_bytes(pickle.dumps(keys))
    return root / "lmdb"


def write_list(root: Path, count: int) -> Path:
    """A list of LUPerson's size and key lengths; only its first image exists."""
    (root / "00_00_0000_00000000.jpg").write_bytes(b"")
    with (root / "list.txt").open("w") as file:
        file.writelines(f"{n % 50:02}_{n % 90:02}_{n % 9999:04}_{n:08}.jpg\n" for n in range(count))
    return root / "list.txt"


def read_all(source: ImageSource) -> None:
    """Every record, in a random order."""
    for index in np.random.default_rng(0).permutation(len(source)):
        source.read(int(index))


def main() -> None:
    """Write the files, measure, print the table, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small, seconds")
    options = parser.parse_args()
    shrink = QUICK if options.quick else 1
    harness.announce("cpu")
    workers = worker_count(-1)
    rows: list[dict[str, Any]] = []

    def bench(op: str, backend: str, count: int, work: Callable[[], Any], **options: Any) -> None:
        measured = harness.measure(work, repeats=3, **options)
        rate = count / measured.at(50)
        goal = GOALS.get(op)
        verdict = "" if goal is None else f"goal {goal:,}: {'reached' if rate >= goal else 'MISSED'}"
        print(f"{op:24}{backend:12}{count:>10,}{measured.text()} {rate:>12,.0f}/s  {verdict}", flush=True)
        rows.append(harness.row(op, backend, [count], measured, "uint8", per_s=rate, workers=workers))

    with tempfile.TemporaryDirectory(prefix="bench_sources_") as name:
        root = Path(name)
        source = FolderSource(write_images(root, 20_000 // shrink))
        size = sum(len(source.read(index)) for index in range(len(source))) / len(source)
        print(f"{len(source):,} images of {size:,.0f} bytes, {workers} workers")
        print(f"{'':24}{'':12}{'records':>10}{'median':>10} {'peak GiB':>9}")
        for op, verify in (("pack", False), ("pack, decode-verified", True)):

            def clear() -> None:
                shutil.rmtree(root / "shards", ignore_errors=True)

            bench(
                op,
                "folder",
                len(source),
                lambda verify=verify: pack(source, root / "shards", 256, workers, verify),
                prepare=clear,
                warmup=0,
            )
        bench("check", "folder", len(source), lambda: scan(source, workers))
        for op, backend, packed in (
            ("lmdb read", "lmdb", LmdbSource(write_lmdb(root, source))),
            ("shard read", "shards", ShardSource(root / "shards")),
            ("file read", "folder", source),
        ):
            bench(op, backend, len(packed), lambda packed=packed: read_all(packed))
        file = write_list(root, LUPERSON // shrink)
        bench("open a list", "list", LUPERSON // shrink, lambda: ListSource(file), warmup=0)
    print(f"appended to {harness.append_rows('sources_quick' if options.quick else 'sources', rows, 'cpu')}")


if __name__ == "__main__":
    main()
