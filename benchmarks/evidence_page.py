"""Tables of the rows that evidence.py writes, and docs/evidence.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tables import grid

Row = dict[str, Any]

SEEDS = (0, 1, 2)
SCRATCH = "scratch"
TITLES = {SCRATCH: "from scratch", "dino": "DINO only", "mim": "MIM only", "dino+mim": "DINO + MIM"}
"""Of the arms, in the order of the tables."""

COLUMNS = {"mAP": "mAP", "rank1": "rank-1", "rr_mAP": "rr-mAP", "rr_rank1": "rr-rank-1"}
TABLES = {
    "All queries, fine-tuned": ("", tuple(COLUMNS)),
    "Occluded queries, fine-tuned": ("occluded_", tuple(COLUMNS)),
    "All queries, before fine-tuning": ("frozen_", ("mAP", "rank1")),
}
"""Title -> prefix of its figures in a row, and the figures."""

INTRODUCTION = """# What pre-training is worth as a start, in miniature

Written by `python benchmarks/evidence.py --page` from `benchmarks/results/evidence.jsonl`; no figure here was typed.

A ViT-S at 256x128 starts in four ways: from random weights; pre-trained by DINO alone (no patch loss, nothing
masked); by masked image modelling (MIM) alone (no CLS loss, and no local crops, which only that loss looks at); and by
both, as in the paper. Pre-training sees no names. Then all four are fine-tuned alike on labelled persons and search
for others in other cameras. All persons are drawn; those of pre-training, fine-tuning and test are different ones. The
recipes are `vit_small_luperson` and `finetune_market1501_vit_small` cut to minutes, with changes that make few steps
count; `benchmarks/evidence_arms.py` holds them, and each row lists its own.

Figures are percent: mean ± sample standard deviation over seeds. rr-: after k-reciprocal re-ranking. Occluded queries
have something in front of the person; they are searched for in the whole gallery, and re-ranked as a set of their own,
without the other queries. Before fine-tuning: CLS features of the frozen backbone; from scratch: of random weights.
Differences are between runs with the same seed, which start from the same random weights.

What this can show: whether within minutes, on drawn persons, a start beats random weights under the same fine-tuning
by more than the seeds scatter. A seed changes weights, order and augmentation, not the persons, and a standard
deviation of three values is itself rough: a difference about as large as it says nothing.
What it cannot show: how good PersonViT is on photographs, or what 300 epochs on 4 million crops bring. Nor is the
computation the same: "from scratch" has no pre-training whose time could have gone into fine-tuning, and MIM alone sees
fewer crops of each image. MIM alone also gives the CLS token, which is what is searched by, no loss of its own.
"""
NOT_MEASURED = """
**Not measured: no GPU was at hand.** On a machine that has one (stopped early, the first command goes on):

```
python benchmarks/evidence.py
python benchmarks/evidence.py --page
```
"""


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; [] where there is none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each arm and seed the latest row; by arm, then by seed."""
    found = {(list(TITLES).index(row["arm"]), row["seed"]): row for row in rows}
    return [row for _, row in sorted(found.items())]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation in percent; a single value alone."""
    mean = round(100 * statistics.mean(values), 1) + 0.0  # no -0.0
    return f"{mean:{sign}.1f}" + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def arms_table(rows: Sequence[Row], prefix: str, names: Sequence[str]) -> str:
    """Mean and spread of each arm."""
    lines = []
    for arm, title in TITLES.items():
        own = [row for row in rows if row["arm"] == arm]
        if own:
            lines.append([title, str(len(own)), *(spread([row[prefix + name] for row in own]) for name in names)])
    return _text(["start", "seeds", *(COLUMNS[name] for name in names)], lines)


def differences_table(rows: Sequence[Row], prefix: str, names: Sequence[str]) -> str:
    """Mean and spread of the differences to `scratch` with the same seed; "" if there is no such pair."""
    scratch = {row["seed"]: row for row in rows if row["arm"] == SCRATCH}
    lines = []
    for arm, title in TITLES.items():
        pairs = [(row, scratch[row["seed"]]) for row in rows if row["arm"] == arm and row["seed"] in scratch]
        if arm != SCRATCH and pairs:
            cells = [spread([row[prefix + name] - base[prefix + name] for row, base in pairs], "+") for name in names]
            lines.append([title, str(len(pairs)), *cells])
    head = ["less from scratch", "pairs", *(COLUMNS[name] for name in names)]
    return _text(head, lines) if lines else ""


def runs_table(rows: Sequence[Row]) -> str:
    """Every run in a line."""
    shown = ("mAP", "rr_mAP", "occluded_mAP", "occluded_rr_mAP", "frozen_mAP")
    head = ["start", "seed", "mAP", "rr-mAP", "occluded mAP", "occluded rr-mAP", "mAP before"]
    head += ["images pre-trained", "min", "images fine-tuned", "min", "commit"]
    lines = []
    for row in rows:
        line = [TITLES[row["arm"]], str(row["seed"]), *(f"{100 * row[key]:.1f}" for key in shown)]
        for training in ("pretrain", "finetune"):
            line += [f"{row[f'{training}_images']:,}", f"{row[f'{training}_seconds'] / 60:.1f}"]
        lines.append([*line, row["commit"]])
    return _text(head, lines)


def tables(rows: Iterable[Row]) -> str:
    """All tables about rows of the same settings."""
    rows = latest(rows)
    parts = []
    for title, (prefix, names) in TABLES.items():
        parts += [f"### {title}\n", arms_table(rows, prefix, names), differences_table(rows, prefix, names)]
    return "\n".join(part for part in [*parts, "### Every run\n", runs_table(rows)] if part)


def missing_text(rows: Iterable[Row], arms: Iterable[str], seeds: Sequence[int]) -> str:
    """Says which of the wanted runs have no row; "" if none."""
    done = {(row["arm"], row["seed"]) for row in rows}
    missing = [f"{TITLES[arm]} seed {seed}" for seed in seeds for arm in arms if (arm, seed) not in done]
    return f"Incomplete; without a row: {', '.join(missing)}.\n" if missing else ""


def page(rows: Sequence[Row]) -> str:
    """docs/evidence.md: a section for each settings, the newest first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["settings"], []).append(row)
    newest_first = sorted(groups.items(), key=lambda item: item[1][-1]["date"], reverse=True)
    sections = "".join(_section(digest, group) for digest, group in newest_first)
    return INTRODUCTION + (sections or NOT_MEASURED)


def _section(digest: str, group: list[Row]) -> str:
    row = group[-1]
    devices = ", ".join(sorted({row["device"] for row in group}))
    changes = row["overrides"]
    return (
        f"\n## Settings {digest}\n\nOn {devices}.\n"
        f"Pre-training: {row['pool_images']:,} crops of {row['pool_ids']:,} persons. "
        f"Fine-tuning: {row['train_images']:,} images of {row['train_ids']:,} persons.\n"
        f"Search: {row['queries']:,} queries of {row['test_ids']:,} persons, {row['occluded_queries']:,} of them "
        f"occluded, in a gallery of {row['gallery']:,} images.\n"
        f"{missing_text(group, TITLES, SEEDS)}\n{tables(group)}\n"
        f"Changes to `{row['recipes'][0]}`; of two for one key the later counts:\n\n{_code(changes['pretrain'])}\n"
        f"Changes to `{row['recipes'][1]}`:\n\n{_code(changes['finetune'])}"
    )


def _text(head: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join(grid(head, lines)) + "\n"


def _code(items: Sequence[str], width: int = 110) -> str:
    lines = [""]
    for item in items:
        if lines[-1] and len(lines[-1]) + 1 + len(item) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {item}".strip()
    return "\n".join(["```", *lines, "```", ""])
