"""Features, distances and ranking metrics of person retrieval."""

from __future__ import annotations

from personvit.ops import knn
from personvit.retrieval.distances import pairwise_distance
from personvit.retrieval.evaluation import evaluate_backbone, evaluate_features
from personvit.retrieval.features import FeatureSet, extract_features
from personvit.retrieval.metrics import RankingResult, rank_metrics

__all__ = [
    "FeatureSet",
    "RankingResult",
    "evaluate_backbone",
    "evaluate_features",
    "extract_features",
    "knn",
    "pairwise_distance",
    "rank_metrics",
]
