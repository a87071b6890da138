"""The only doorway to fast code: one typed function per operator, its reference, and the choice of backend."""

from __future__ import annotations

from personvit.ops.attention import attention, packed_attention
from personvit.ops.backend import ReportRow, get_backend, report, set_backend
from personvit.ops.masks import block_masks
from personvit.ops.neighbours import knn

__all__ = ["ReportRow", "attention", "block_masks", "get_backend", "knn", "packed_attention", "report", "set_backend"]
