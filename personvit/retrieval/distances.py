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
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False), _full_precision():
        query, gallery = query.float(), gallery.float()
        distmat = query.square().sum(1, keepdim=True) + gallery.square().sum(1)  # [Q, G]
        return distmat.addmm_(query, gallery.t(), alpha=-2)


@contextmanager
def _full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
