"""Evaluate features, or a backbone on a labelled set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from personvit.data.reid_sets import ReIDSet, ReIDSplit
from personvit.errors import DataError
from personvit.retrieval.checks import check_features
from personvit.retrieval.distances import distance_blocks
from personvit.retrieval.expansion import expand_queries
from personvit.retrieval.features import UNKNOWN, Backbone, FeatureSet, extract_features
from personvit.retrieval.metrics import (
    Labels,
    RankingResult,
    concatenate,
    score_queries,
    summarise,
    why_no_query_is_valid,
)
from personvit.retrieval.rerank import RerankParameters, first_ranks, reranked_blocks
from personvit.runtime.distributed import Ranks

_BLOCK = 1024  # queries whose distances are held at once: 1024 x 82,161 of MSMT17 is 321 MiB
_PROGRESS_FROM = 2048  # queries; shorter work needs no progress bar


@dataclass(frozen=True)
class Ranking:
    """Scores of a set of queries, and what they were found to look like.

    Attributes:
        result: the averages and the scores of single queries.
        top: [Q, min(top, G)] int64, first gallery indices of every query without those that the protocol takes out
            (-1 where nothing is left); None if not asked for.
    """

    result: RankingResult
    top: npt.NDArray[np.int64] | None


def evaluate_features(
    query: FeatureSet, gallery: FeatureSet, max_rank: int = 50, *, protocol: str = "market"
) -> RankingResult:
    """Rank the gallery for each query by squared Euclidean distance. The whole distance matrix never exists.

    Args:
        query: features of the query images, labelled.
        gallery: features of the gallery, labelled, of the same model.
        max_rank: length of the CMC curve.
        protocol: same-camera rule, as in `rank_metrics`.

    Raises:
        DataError: features without labels, of different widths, or no valid query.
    """
    return rank_features(query, gallery, max_rank, protocol=protocol).result


def rank_features(
    query: FeatureSet,
    gallery: FeatureSet,
    max_rank: int = 50,
    *,
    protocol: str = "market",
    rerank: RerankParameters | None = None,
    top: int = 0,
    progress: bool = False,
) -> Ranking:
    """As `evaluate_features`, by re-ranked distances if wanted, and with the first gallery images of every query.

    Args:
        query: features of the query images, labelled.
        gallery: features of the gallery, labelled, of the same model.
        max_rank: length of the CMC curve.
        protocol: same-camera rule, as in `rank_metrics`.
        rerank: parameters of re-ranking; None: none.
        top: first gallery images to keep of every query; 0: none.
        progress: show bars if there is a terminal and the sets are large.

    Raises:
        DataError: features without labels, not finite or zero, of different widths, or no valid query.
    """
    labels = _labels(query, gallery).under(protocol)
    left, right = check_features(query.features, gallery.features)
    if rerank is None:
        blocks = _distance_blocks(left, right, progress)
    else:
        blocks = reranked_blocks(left, right, rerank, progress=progress)
    return rank_blocks(blocks, labels, max_rank, top)


def rank_blocks(blocks: Iterable[Tensor], labels: Labels, max_rank: int = 50, top: int = 0) -> Ranking:
    """Rank from consecutive blocks of queries of a distance matrix, [b, G] each; none is kept.

    Raises:
        DataError: NaN among the distances, or no valid query.
    """
    scores, lists, start = [], [], 0
    for block in blocks:
        part = labels.rows(slice(start, start + len(block)))
        scores.append(score_queries(block, part))
        if top:
            lists.append(_first_kept(block, part, top))
        start += len(block)
    return Ranking(summarise(concatenate(scores), labels, max_rank), np.concatenate(lists) if top else None)


def expanded_queries(query: FeatureSet, gallery: FeatureSet, top: int, alpha: float = 0.0) -> FeatureSet:
    """The queries after `expand_queries`; the images of the gallery join unlabelled, of whatever camera they are."""
    return replace(query, features=expand_queries(query.features, gallery.features, top, alpha))


def backbone_features(
    model: Backbone,
    reid_set: ReIDSet,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 64,
    *,
    flip: bool = False,
    num_workers: int = 0,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> tuple[FeatureSet, FeatureSet]:
    """Features of the query and of the gallery images of a set. Arguments and errors as `extract_features`."""

    def features(split: ReIDSplit) -> FeatureSet:
        return extract_features(
            model,
            split.paths,
            image_size,
            mean,
            std,
            batch_size,
            pids=split.pids,
            camids=split.camids,
            flip=flip,
            num_workers=num_workers,
            progress=progress,
            ranks=ranks,
        )

    return features(reid_set.query), features(reid_set.gallery)


def evaluate_backbone(
    model: Backbone,
    reid_set: ReIDSet,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 64,
    *,
    max_rank: int = 50,
    protocol: str = "market",
    flip: bool = False,
    num_workers: int = 0,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> RankingResult:
    """Extract the features of query and gallery and rank. Arguments as in `extract_features` and `evaluate_features`.

    Raises:
        DataError: an image cannot be read, or no query is valid.
    """
    query, gallery = backbone_features(
        model,
        reid_set,
        image_size,
        mean,
        std,
        batch_size,
        flip=flip,
        num_workers=num_workers,
        progress=progress,
        ranks=ranks,
    )
    return evaluate_features(query, gallery, max_rank, protocol=protocol)


def _labels(query: FeatureSet, gallery: FeatureSet) -> Labels:
    for name, part in (("query", query), ("gallery", gallery)):
        if len(part) and (part.pids == UNKNOWN).all():
            raise DataError(
                f"The {name} features carry no identities (all pids are {UNKNOWN}): give pids= and camids=."
            )
    labels = Labels(query.pids, gallery.pids, query.camids, gallery.camids)
    if not len(query) or not len(gallery):
        raise DataError(why_no_query_is_valid(labels))
    return labels


def _distance_blocks(query: Tensor, gallery: Tensor, progress: bool) -> Iterator[Tensor]:
    hide_bar = not progress or len(query) < _PROGRESS_FROM or None  # None: hidden unless on a terminal
    with tqdm(total=len(query), desc="ranking", unit="query", disable=hide_bar) as bar:
        for block in distance_blocks(query, gallery, _BLOCK):
            yield block
            bar.update(len(block))


def _first_kept(distances: Tensor, labels: Labels, count: int) -> npt.NDArray[np.int64]:
    """The `count` nearest gallery indices that the protocol keeps, -1 where there are fewer. [b, G] -> [b, count]."""
    taken_out = np.zeros(tuple(distances.shape), dtype=np.bool_)
    for row in range(len(distances)):
        taken_out[row] = (labels.g_pids == labels.q_pids[row]) & (labels.g_camids == labels.q_camids[row])
    junk = torch.from_numpy(taken_out).to(distances.device)
    ranks = first_ranks(distances.masked_fill(junk, torch.inf), min(count, distances.shape[1]))
    return ranks.indices.masked_fill(ranks.distances.isinf(), -1).cpu().numpy()
