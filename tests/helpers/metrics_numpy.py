"""CMC, mAP and mINP in numpy as they were published: one sort of the whole gallery for every query.

The protocol is that of hustvl/PersonViT, utils/metrics.py, and JDAI-CV/fast-reid, evaluation/rank.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def rank_metrics_numpy(
    distmat: npt.NDArray[np.floating],
    q_pids: npt.NDArray[np.int64],
    g_pids: npt.NDArray[np.int64],
    q_camids: npt.NDArray[np.int64],
    g_camids: npt.NDArray[np.int64],
    *,
    kind: str = "stable",
) -> tuple[float, float, float]:
    """mAP, rank-1 and mINP of a distance matrix [Q, G]; `kind` is the sort of numpy."""
    precisions, firsts, penalties = [], [], []
    for query, distances in enumerate(distmat):
        order = np.argsort(distances, kind=kind)  # type: ignore[call-overload]
        same = g_pids[order] == q_pids[query]
        kept = ~(same & (g_camids[order] == q_camids[query]))
        hits = np.flatnonzero(same[kept]) + 1  # ranks of the matches
        if len(hits):
            precisions.append(np.mean(np.arange(1, len(hits) + 1) / hits))
            firsts.append(hits[0] == 1)
            penalties.append(len(hits) / hits[-1])
    return float(np.mean(precisions)), float(np.mean(firsts)), float(np.mean(penalties))
