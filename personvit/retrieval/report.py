"""Results as tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from personvit.data.reid_sets import ReIDSet
from personvit.retrieval.evaluation import Ranking
from personvit.retrieval.metrics import RankingResult

RANKS = (1, 5, 10)
TOP = 10
"""Gallery images that the result of a query names."""

RERANKED = "rr-"
"""Prefix of the columns of re-ranked figures."""


def figures(result: RankingResult) -> dict[str, float]:
    """The headline figures by their column name, shares in [0, 1]."""
    return {"mAP": result.mAP, **{f"R{k}": result.rank(k) for k in RANKS}, "mINP": result.mINP}


def plain_figures(result: RankingResult) -> dict[str, Any]:
    """The headline figures and the CMC curve by the keys of the JSON file, shares in [0, 1]."""
    return {
        "mAP": result.mAP,
        **{f"rank{k}": result.rank(k) for k in RANKS},
        "mINP": result.mINP,
        "cmc": [float(value) for value in result.cmc],
    }


def table(rows: Mapping[str, tuple[RankingResult, RankingResult | None]]) -> str:
    """Figures in percent, a line per data set; those of re-ranking in their own columns.

    Args:
        rows: name of a data set -> plain result, and re-ranked result or None. A single set's name is left out.
    """
    named = len(rows) > 1
    width = max(len(name) for name in rows) + 1 if named else 0
    lines: list[str] = []
    for name, (plain, reranked) in rows.items():
        columns = figures(plain)
        if reranked is not None:
            columns |= {RERANKED + column: value for column, value in figures(reranked).items()}
        if not lines:
            lines.append("data".ljust(width)[:width] + "".join(f"{column:>8}" for column in columns))
        lines.append(
            (name if named else "").ljust(width) + "".join(f"{100 * value:8.2f}" for value in columns.values())
        )
    return "\n".join(lines)


def query_rows(reid_set: ReIDSet, plain: Ranking, reranked: Ranking | None) -> list[dict[str, Any]]:
    """One row per query: labels, scores, and the first gallery images by path; with re-ranking, those after it too.

    Scores of a query without a match are None: it is in no average.
    """
    rows: list[dict[str, Any]] = [
        {"data": reid_set.name, "query": path, "pid": int(pid), "camid": int(camid), "valid": bool(valid)}
        for path, pid, camid, valid in zip(
            reid_set.query.paths, reid_set.query.pids, reid_set.query.camids, plain.result.valid, strict=True
        )
    ]
    for prefix, ranking in (("", plain), ("rerank_", reranked)):
        if ranking is None:
            continue
        place = np.cumsum(ranking.result.valid) - 1  # of a query among the valid ones
        for number, row in enumerate(rows):
            result, at = ranking.result, place[number]
            row[f"{prefix}AP"] = float(result.all_AP[at]) if row["valid"] else None
            row[f"{prefix}INP"] = float(result.all_INP[at]) if row["valid"] else None
            row[f"{prefix}first_match"] = int(result.all_first[at]) if row["valid"] else None
            found = [] if ranking.top is None else ranking.top[number]
            row[f"{prefix}top"] = [reid_set.gallery.paths[index] for index in found if index >= 0]
    return rows


def queries_as_json(rows: Iterable[dict[str, Any]]) -> str:
    """A list of objects."""
    return json.dumps(list(rows), indent=1) + "\n"


def queries_as_csv(rows: Iterable[dict[str, Any]]) -> str:
    """A line per query; the list of gallery images becomes the columns top1 ... top10, missing values stay empty."""
    flat = [_flat(row) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, list):
            flat |= {f"{key}{k + 1}": value[k] if k < len(value) else "" for k in range(TOP)}
        else:
            flat[key] = int(value) if isinstance(value, bool) else value
    return flat
