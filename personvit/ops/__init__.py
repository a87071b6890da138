"""The only doorway to fast code: one typed function per operator, its reference, and the choice of backend."""

from __future__ import annotations

from personvit.ops.adamw import adamw_ema
from personvit.ops.attention import packed_attention
from personvit.ops.backend import ReportRow, get_backend, report, set_backend
from personvit.ops.colour import photometry
from personvit.ops.distill import distill_cross_entropy
from personvit.ops.masks import block_masks
from personvit.ops.neighbours import knn, nearest, pairwise_distance
from personvit.ops.norm import add_layer_norm
from personvit.ops.rerank import Encoding, encode, rerank, rerank_block, rerank_block_lists
from personvit.ops.retrieval import jaccard, k_reciprocal, query_expansion, rank_counts, reciprocal_weights
from personvit.ops.tokens import assemble_tokens, gather_rows

__all__ = [
    "Encoding",
    "ReportRow",
    "adamw_ema",
    "add_layer_norm",
    "assemble_tokens",
    "block_masks",
    "distill_cross_entropy",
    "encode",
    "gather_rows",
    "get_backend",
    "jaccard",
    "k_reciprocal",
    "knn",
    "nearest",
    "packed_attention",
    "pairwise_distance",
    "photometry",
    "query_expansion",
    "rank_counts",
    "reciprocal_weights",
    "report",
    "rerank",
    "rerank_block",
    "rerank_block_lists",
    "set_backend",
]
