"""Ranking metrics of person ReID: mAP, CMC and mINP under the Market-1501 protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personvit import ops
from personvit.errors import DataError

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RankingResult:
    """Retrieval quality over the valid queries.

    A query is valid when the gallery shows its identity in another camera; all others are in no average.

    Attributes:
        mAP: mean average precision in [0, 1].
        cmc: [min(max_rank, G)] float32, cmc[k - 1] = share of valid queries with a match among the first k.
        mINP: mean inverse negative penalty in [0, 1].
        valid: [Q] bool.
        all_AP: [valid.sum()] float64, average precision of the valid queries in query order.
        all_INP: [valid.sum()] float64, likewise.
        all_first: [valid.sum()] int64, 1-based rank of the first match, likewise.
    """

    mAP: float
    cmc: npt.NDArray[np.float32]
    mINP: float
    valid: BoolArray
    all_AP: FloatArray
    all_INP: FloatArray
    all_first: IntArray

    def rank(self, k: int) -> float:
        """CMC at rank k >= 1, in [0, 1]; beyond the last stored rank it is that rank's value."""
        return float(self.cmc[min(k, len(self.cmc)) - 1])


class Labels(NamedTuple):
    """Identities and cameras of a query set [Q] and a gallery [G], int64."""

    q_pids: IntArray
    g_pids: IntArray
    q_camids: IntArray
    g_camids: IntArray

    def under(self, protocol: str) -> Labels:
        """The labels by which a protocol scores: under `keep` no query shares a camera with the gallery."""
        if protocol == "market":
            return self
        if protocol != "keep":
            raise ValueError(f"protocol={protocol!r}: expected market or keep")
        return self._replace(q_camids=np.full_like(self.q_camids, -1), g_camids=np.zeros_like(self.g_camids))

    def rows(self, part: slice) -> Labels:
        """The labels of some queries and of the whole gallery."""
        return self._replace(q_pids=self.q_pids[part], q_camids=self.q_camids[part])


@dataclass(frozen=True)
class QueryScores:
    """Scores of single queries, the parts that a `RankingResult` averages.

    Attributes:
        first: [Q] int64, 1-based rank of the first match; 0 for an invalid query.
        average_precision: [Q] float64; 0 for an invalid query.
        inverse_penalty: [Q] float64; 0 for an invalid query.
    """

    first: IntArray
    average_precision: FloatArray
    inverse_penalty: FloatArray


def rank_metrics(
    distmat: Tensor | npt.NDArray[np.float32],
    q_pids: npt.ArrayLike,
    g_pids: npt.ArrayLike,
    q_camids: npt.ArrayLike,
    g_camids: npt.ArrayLike,
    max_rank: int = 50,
    *,
    protocol: str = "market",
) -> RankingResult:
    """mAP, CMC and mINP of a distance matrix.

    Per query the gallery is ordered by (distance, gallery index), entries of the same identity in the same camera are
    taken out (they shift later ranks up), and with R matches left at the 1-based ranks p_1 < ... < p_R:
    AP = mean_i(i / p_i), INP = R / p_R (Ye et al. 2021, "Deep Learning for Person Re-identification"), and CMC(k) is 1
    from k = p_1 on. Same numbers as eval_func of hustvl/PersonViT and eval_market1501 of JDAI-CV/fast-reid, except that
    ties have a defined order and a short gallery is no error: CMC keeps its last value.

    Args:
        distmat: [Q, G] float32, smaller is closer; wider types are rounded to it.
        q_pids: [Q] identities of the queries.
        g_pids: [G] identities of the gallery.
        q_camids: [Q] cameras of the queries.
        g_camids: [G] cameras of the gallery.
        max_rank: length of `cmc`; cut to G if the gallery is smaller.
        protocol: market takes out same identity and camera; keep counts such entries as matches (for sets of one
            camera; not comparable with published figures).

    Raises:
        ValueError: shapes that do not fit together, max_rank < 1, or an unknown protocol.
        DataError: NaN in `distmat`, or no valid query; the message counts the causes.
    """
    labels = Labels(*(np.asarray(x, dtype=np.int64) for x in (q_pids, g_pids, q_camids, g_camids)))
    labels = labels.under(protocol)
    return summarise(score_queries(distmat, labels), labels, max_rank)


def score_queries(distmat: Tensor | npt.NDArray[np.float32], labels: Labels) -> QueryScores:
    """Scores of each query of `distmat` [Q, G], so that a large set can be ranked block by block."""
    q_pids, g_pids, q_camids, g_camids = labels
    matrix = (distmat.detach() if isinstance(distmat, Tensor) else torch.as_tensor(distmat)).float()
    if matrix.dim() != 2 or matrix.shape != (len(q_pids), len(g_pids)):
        raise ValueError(f"distmat is {tuple(matrix.shape)}, the labels say ({len(q_pids)}, {len(g_pids)})")
    if len(q_camids) != len(q_pids) or len(g_camids) != len(g_pids):
        raise ValueError("pids and camids differ in length")
    on_device = (torch.from_numpy(label).to(matrix.device) for label in labels)
    precision, penalty, first, _ = (score.cpu().numpy() for score in ops.rank_counts(matrix, *on_device))
    return QueryScores(first, precision, penalty)


def summarise(scores: QueryScores, labels: Labels, max_rank: int = 50) -> RankingResult:
    """Average the scores of the valid queries. Arguments and errors as in `rank_metrics`."""
    if max_rank < 1:
        raise ValueError(f"max_rank={max_rank}: expected 1 or more")
    valid = scores.first > 0
    if not valid.any():
        raise DataError(why_no_query_is_valid(labels))
    length = min(max_rank, len(labels.g_pids))
    hits = np.bincount(scores.first[valid] - 1, minlength=length)[:length]
    return RankingResult(
        mAP=float(scores.average_precision[valid].mean()),
        cmc=(np.cumsum(hits) / valid.sum()).astype(np.float32),
        mINP=float(scores.inverse_penalty[valid].mean()),
        valid=valid,
        all_AP=scores.average_precision[valid],
        all_INP=scores.inverse_penalty[valid],
        all_first=scores.first[valid],
    )


def concatenate(blocks: list[QueryScores]) -> QueryScores:
    """Join the scores of consecutive blocks of queries."""
    return QueryScores(
        np.concatenate([block.first for block in blocks]),
        np.concatenate([block.average_precision for block in blocks]),
        np.concatenate([block.inverse_penalty for block in blocks]),
    )


def why_no_query_is_valid(labels: Labels) -> str:
    """Message that counts the causes, for when every query is invalid."""
    q_pids, g_pids, q_camids, g_camids = labels
    if not len(q_pids) or not len(g_pids):
        return (
            f"Nothing to evaluate: {len(q_pids)} queries against {len(g_pids)} gallery images. "
            f"Check the folders of the data set with data.root=FOLDER."
        )
    absent = int((~np.isin(q_pids, g_pids)).sum())
    own_camera = len(q_pids) - absent
    if own_camera > absent:
        cameras = len(np.unique(np.concatenate([q_camids, g_camids])))
        cause = (
            f"Likely cause: the same-camera rule. The camera labels ({cameras} distinct) are wrong, or the set has one "
            f"camera only; then count matches of the same camera with --protocol keep (in Python: protocol='keep')"
        )
    else:
        cause = "Likely cause: query and gallery come from different data sets, or a label file is shifted"
    return (
        f"None of the {len(q_pids)} queries can be evaluated: {absent} have an identity that is absent from the "
        f"gallery, {own_camera} one that the gallery shows in their own camera only (a match must come "
        f"from another camera). {cause}. Check the file names under data.root, then run personvit evaluate again."
    )
