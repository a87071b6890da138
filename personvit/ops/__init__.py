"""The only doorway to fast code: one typed function per operator, its reference, and the choice of backend."""

from __future__ import annotations

from personvit.ops.attention import packed_attention
from personvit.ops.backend import ReportRow, get_backend, report, set_backend
from personvit.ops.masks import block_masks
from personvit.ops.neighbours import knn, nearest, pairwise_distance
from personvit.ops.rerank import Encoding, encode, rerank, rerank_block, rerank_block_lists
from personvit.ops.retrieval import jaccard, k_reciprocal, query_expansion, rank_counts, reciprocal_weights

__all__ = [
    "Encoding",
    "ReportRow",
    "block_masks",
    "encode",
    "get_backend",
    "jaccard",
    "k_reciprocal",
    "knn",
    "nearest",
    "packed_attention",
    "pairwise_distance",
    "query_expansion",
    "rank_counts",
    "reciprocal_weights",
    "report",
    "rerank",
    "rerank_block",
    "rerank_block_lists",
    "set_backend",
]
