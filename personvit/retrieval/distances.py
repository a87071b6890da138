"""Distances between features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def pairwise_distance(query: Tensor, gallery: Tensor) -> Tensor:
    """Squared Euclidean distances |q|^2 + |g|^2 - 2 q.g, not clamped (hustvl/PersonViT, utils/metrics.py).

    For L2-normalised features this is 2 - 2 cos; equal features may come out a rounding error below 0. Computed in
    full float32 whatever autocast or the TF32 setting says: half precision changes rankings.

    Args:
        query: [Q, D] features.
        gallery: [G, D] features on the same device.

    Returns:
        [Q, G] float32.
    """
    return next(distance_blocks(query, gallery, max(1, len(query))))


def distance_blocks(query: Tensor, gallery: Tensor, rows: int) -> Iterator[Tensor]:
    """`pairwise_distance` in consecutive blocks of `rows` queries, [rows, G] each but for the last.

    All blocks share one memory, since touching fresh pages costs a third of the time of the product: a block holds
    until the next is asked for.
    """
    with torch.no_grad():
        query, gallery = query.float(), gallery.float()
        squares = gallery.square().sum(1)  # [G], once for all blocks
        memory = query.new_empty((min(rows, len(query)), len(gallery)))
    for part in torch.split(query, rows):
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False), _full_precision():
            distmat = torch.add(part.square().sum(1, keepdim=True), squares, out=memory[: len(part)])  # [b, G]
            distmat.addmm_(part, gallery.t(), alpha=-2)
        yield distmat


@contextmanager
def _full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
