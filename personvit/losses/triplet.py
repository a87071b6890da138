"""Batch-hard triplets (Hermans et al. 2017, arXiv 1703.07737), as in hustvl/PersonViT loss/triplet_loss.py.

Plain torch: a batch of 64 has 64 x 64 distances, 16 KiB, so there is no memory to save and nothing to fuse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMALLEST = 1e-12  # of a squared distance; below it the slope of the root is 0, not infinite (published)


class HardestPairs(NamedTuple):
    """For every anchor of a batch its furthest positive and nearest negative."""

    positive: Tensor
    """[B] float32 distance to the furthest image of the same identity, the anchor itself included."""
    negative: Tensor
    """[B] float32 distance to the nearest image of another identity; infinity if there is none."""
    positive_index: Tensor
    """[B] int64."""
    negative_index: Tensor
    """[B] int64."""


def hardest_pairs(features: Tensor, labels: Tensor) -> HardestPairs:
    """Mine every anchor's hardest pairs by Euclidean distance.

    Identities may have different numbers of images. Distances are sqrt(max(|x|^2 + |y|^2 - 2 x.y, 1e-12)) in float32
    (the published code lets autocast take the product in float16, too coarse for images that are close).

    Args:
        features: [B, D], any floating dtype, as they are: no normalisation.
        labels: [B] int64.
    """
    with torch.autocast(features.device.type, enabled=False):
        wide = features.float() if features.element_size() < 4 else features
        squares = wide.square().sum(dim=1)
        squared = squares[:, None] + squares[None, :] - 2 * wide @ wide.T  # [B, B]
        distances = squared.clamp(min=_SMALLEST).sqrt()
    same = labels[:, None] == labels[None, :]
    positive, positive_index = distances.masked_fill(~same, -torch.inf).max(dim=1)
    negative, negative_index = distances.masked_fill(same, torch.inf).min(dim=1)
    return HardestPairs(positive, negative, positive_index, negative_index)


class TripletLoss(nn.Module):
    """Every anchor's furthest positive has to be nearer than its nearest negative, mean over the batch.

    Args:
        margin: max(0, positive - negative + margin). None: soft margin, log(1 + exp(positive - negative)).
    """

    def __init__(self, margin: float | None = None) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean over anchors.

        Args:
            features: [B, D], any floating dtype.
            labels: [B] int64, of two identities at least.

        Returns:
            Scalar float32 (float64 for float64 features). On CUDA a batch of one identity gives NaN, which a training
            step refuses: raising there would make the host wait for the device at every step.

        Raises:
            ValueError: labels on the CPU that are all the same.
        """
        if not labels.is_cuda and bool((labels == labels[:1]).all()):
            raise ValueError(
                f"A batch of {len(labels)} images of one identity has no negative, and no triplet: batches need two "
                "identities or more. Is the batch drawn by IdentitySampler, with train.batch_size at least 2 x "
                "train.instances per rank?"
            )
        positive, negative, _, _ = hardest_pairs(features, labels)
        gap = positive - negative.masked_fill(negative.isinf(), torch.nan)
        each = F.softplus(gap) if self.margin is None else F.relu(gap + self.margin)
        return each.mean()
