"""Features, distances, re-ranking and ranking metrics of person retrieval."""

from __future__ import annotations

from personvit.ops import knn
from personvit.retrieval.distances import pairwise_distance
from personvit.retrieval.evaluation import (
    Ranking,
    evaluate_backbone,
    evaluate_features,
    rank_blocks,
    rank_features,
)
from personvit.retrieval.expansion import expand_queries
from personvit.retrieval.features import FeatureSet, extract_features
from personvit.retrieval.metrics import RankingResult, rank_metrics
from personvit.retrieval.rerank import RankedLists, RerankParameters, rerank, reranked_blocks

__all__ = [
    "FeatureSet",
    "RankedLists",
    "Ranking",
    "RankingResult",
    "RerankParameters",
    "evaluate_backbone",
    "evaluate_features",
    "expand_queries",
    "extract_features",
    "knn",
    "pairwise_distance",
    "rank_blocks",
    "rank_features",
    "rank_metrics",
    "rerank",
    "reranked_blocks",
]
