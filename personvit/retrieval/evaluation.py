"""Evaluate features, or a backbone on a labelled set."""

from __future__ import annotations

from collections.abc import Sequence

from personvit.data.reid_sets import ReIDSet, ReIDSplit
from personvit.errors import DataError
from personvit.retrieval.distances import pairwise_distance
from personvit.retrieval.features import UNKNOWN, Backbone, FeatureSet, extract_features
from personvit.retrieval.metrics import (
    Labels,
    RankingResult,
    concatenate,
    score_queries,
    summarise,
    why_no_query_is_valid,
)

_BLOCK = 1024  # queries whose distances are held at once: 1024 x 82,161 of MSMT17 is 321 MiB


def evaluate_features(query: FeatureSet, gallery: FeatureSet, max_rank: int = 50) -> RankingResult:
    """Rank the gallery for each query by squared Euclidean distance. The whole distance matrix never exists.

    Args:
        query: features of the query images, labelled.
        gallery: features of the gallery, labelled, of the same model.
        max_rank: length of the CMC curve.

    Raises:
        DataError: features without labels, of different widths, or no valid query.
    """
    for name, part in (("query", query), ("gallery", gallery)):
        if len(part) and (part.pids == UNKNOWN).all():
            raise DataError(
                f"The {name} features carry no identities (all pids are {UNKNOWN}): give pids= and camids=."
            )
    labels = Labels(query.pids, gallery.pids, query.camids, gallery.camids)
    if not len(query) or not len(gallery):
        raise DataError(why_no_query_is_valid(labels))
    if query.features.shape[1] != gallery.features.shape[1]:
        raise DataError(
            f"Query features have {query.features.shape[1]} dimensions, gallery features {gallery.features.shape[1]}. "
            f"Extract both with the same model."
        )
    scores = []
    for start in range(0, len(query), _BLOCK):
        block = slice(start, start + _BLOCK)
        distmat = pairwise_distance(query.features[block], gallery.features)
        scores.append(score_queries(distmat, labels._replace(q_pids=query.pids[block], q_camids=query.camids[block])))
    return summarise(concatenate(scores), labels, max_rank)


def evaluate_backbone(
    model: Backbone,
    reid_set: ReIDSet,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 64,
    *,
    max_rank: int = 50,
    flip: bool = False,
    num_workers: int = 0,
    progress: bool = True,
) -> RankingResult:
    """Extract the features of query and gallery and rank. Arguments as in `extract_features`.

    Raises:
        DataError: an image cannot be read, or no query is valid.
    """

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
        )

    return evaluate_features(features(reid_set.query), features(reid_set.gallery), max_rank)
