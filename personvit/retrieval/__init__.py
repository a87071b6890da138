"""Features, distances and ranking metrics of person retrieval."""

from __future__ import annotations

from personvit.retrieval.distances import pairwise_distance
from personvit.retrieval.metrics import RankingResult, rank_metrics

__all__ = ["RankingResult", "pairwise_distance", "rank_metrics"]
