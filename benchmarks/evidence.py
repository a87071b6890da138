"""What pre-training is worth as a start: the paper's comparison in miniature, on generated persons.

python benchmarks/evidence.py             four starts, three seeds; needs a CUDA device
python benchmarks/evidence.py --quick     the same way in half a minute on a CPU: a smoke test that speaks for nothing
python benchmarks/evidence.py --page      write docs/evidence.md from the rows
python benchmarks/evidence.py --check     leave with 1 if that page is not what the rows say

A ViT-S at 256x128 starts from random weights, or is pre-trained on 20,480 crops of 2,560 drawn persons by DINO alone,
by masked patches alone, or by both; then it is fine-tuned on 512 other persons and searches for 300 more, with and
without re-ranking, the occluded queries also apart. One pre-training is 12 epochs of 80 steps of 256 images, 245,760
in all; one fine-tuning 24 epochs of 5,016 images. How long that takes is not known yet; --pretrain train.epochs=... and
--finetune train.epochs=... make it shorter or longer.

The order is seed by seed, all arms of one before the next, so that an early stop still compares all arms. What is
stopped goes on by the same command, and what is finished is not done again: within ten minutes a time, for example,

timeout -s TERM --preserve-status 560 python benchmarks/evidence.py    leaves with 75 if something is left to do

Each finished run adds a row to benchmarks/results/evidence.jsonl. Rows of the same settings belong together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import harness
import torch
from evidence_arms import ARMS, ArmRun, Settings
from evidence_page import SCRATCH, SEEDS, missing_text, page, read_rows, tables

from personvit.data.generated.dataset import ensure_generated
from personvit.errors import EXIT_INTERRUPTED, PersonViTError
from personvit.runtime.entry import run

PAGE = harness.ROOT / "docs" / "evidence.md"
NAME = "evidence.jsonl"


def run_all(settings: Settings, arms: Sequence[str], seeds: Sequence[int], out: Path, rows_file: Path) -> None:
    """Run what has no row yet, seed by seed, and add a row for each run as soon as it is finished."""
    done = {(row["arm"], row["seed"]) for row in read_rows(rows_file) if row["settings"] == settings.digest}
    todo = [(arm, seed) for seed in seeds for arm in arms if (arm, seed) not in done]
    if not todo:
        return
    root = ensure_generated(settings.pretraining(SCRATCH, 0).data)
    for arm, seed in todo:
        row = ArmRun(settings, arm, seed, root, out / f"{arm}-seed{seed}").row()
        facts = harness.machine("cuda" if torch.cuda.is_available() else "cpu")
        rows_file.parent.mkdir(parents=True, exist_ok=True)
        with rows_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **facts}) + "\n")


def update_page(check: bool) -> int:
    """Write docs/evidence.md, or compare it; 1 if it is stale."""
    text = page(read_rows(harness.RESULTS / NAME))
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote docs/{PAGE.name}")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"docs/{PAGE.name} is not what benchmarks/results says: run python benchmarks/evidence.py --page")
        return 1
    return 0


@contextlib.contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM outside of the trainings, which save first, ends the program in the same way: run it again to go on."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(EXIT_INTERRUPTED)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="run folders (default runs/evidence; --quick: runs/evidence-quick)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2; --quick: 0")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--pretrain", nargs="+", default=[], metavar="key=value", help="values of every pre-training")
    parser.add_argument("--finetune", nargs="+", default=[], metavar="key=value", help="values of every fine-tuning")
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model; rows stay in --out")
    parser.add_argument("--page", action="store_true", help="write docs/evidence.md from the rows, train nothing")
    parser.add_argument("--check", action="store_true", help="compare docs/evidence.md with the rows, train nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run, or write or check the page.

    Raises:
        PersonViTError: no CUDA device, or a run failed.
    """
    options = _parser().parse_args(argv)
    if options.page or options.check:
        return update_page(options.check)
    quick: bool = options.quick
    if not quick and not torch.cuda.is_available():
        raise PersonViTError(
            "training a ViT-S at 256x128 so many times needs a CUDA device, and torch.cuda.is_available() is False "
            "(python -m personvit.env says why). To see on a CPU that everything works: "
            "python benchmarks/evidence.py --quick"
        )
    settings = Settings(tuple(options.pretrain), tuple(options.finetune), quick)
    out: Path = options.out or Path("runs/evidence-quick" if quick else "runs/evidence")
    arms = [arm for arm in ARMS if arm in options.arms]
    seeds = options.seeds or (SEEDS[:1] if quick else SEEDS)
    rows_file = out / NAME if quick else harness.RESULTS / NAME
    try:
        with leaving_on_sigterm():
            run_all(settings, arms, seeds, out, rows_file)
    finally:
        rows = [row for row in read_rows(rows_file) if row["settings"] == settings.digest]
        if rows:
            print(f"\n{tables(rows)}")
        print(missing_text(rows, arms, seeds) or f"All {len(arms) * len(seeds)} runs are done, rows in {rows_file}")
        if quick:
            print("--quick: a smoke test of a tiny model after a few steps. No figure above speaks for anything.")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
