"""The network of the fine-tuning: backbone, batch-norm neck, classifier of identities.

Architecture and state-dict names are those of hustvl/PersonViT transreid_pytorch (model/make_model.py), which follows
BNNeck (Luo et al. 2019, arXiv 1903.07071): triplets compare the CLS token itself, the classifier sees it after a batch
norm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from personvit.config.finetune import NECK_FEATURES
from personvit.errors import ConfigError
from personvit.models.vit import VisionTransformer


class ReIDOutputs(NamedTuple):
    """What the losses get."""

    logits: Tensor
    """[B, ids] float32, of the feature after the batch norm."""
    features: Tensor
    """[B, D] float32, before the batch norm."""


class ReIDModel(nn.Module):
    """Backbone, batch norm without a bias, linear classifier without a bias.

    State dict: `base.*` (the backbone under timm's names), `bottleneck.*`, `classifier.weight` [ids, D].

    Neck and classifier compute in float32 whatever autocast says: their product is small, and logits in bfloat16 would
    carry two to three digits. Under several ranks each normalises with the statistics of its own images, as published.

    Args:
        base: the backbone.
        num_ids: identities of the training set.
        neck_feat: which feature `embed` gives, that `before` or `after` the batch norm.
        dropout: share of the feature's values that the classifier does not get; in training mode only.

    Raises:
        ConfigError: no identities, or another neck_feat.
    """

    def __init__(
        self, base: VisionTransformer, num_ids: int, *, neck_feat: str = "before", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if num_ids < 1:
            raise ConfigError(f"num_ids={num_ids}: a classifier needs identities. Check the training set of data.root.")
        if neck_feat not in NECK_FEATURES:
            raise ConfigError(f"model.neck_feat={neck_feat} is unknown. Choose {' or '.join(NECK_FEATURES)}.")
        self.num_ids = num_ids
        self.neck_feat = neck_feat
        self.base = base
        self.bottleneck = nn.BatchNorm1d(base.embed_dim)
        self.bottleneck.bias.requires_grad_(False)  # stays 0: features keep their sign symmetry about the origin
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(base.embed_dim, num_ids, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    @property
    def num_cameras(self) -> int:
        """Cameras that the backbone has vectors for; below 2: none."""
        return self.base.num_cameras

    @property
    def sie_coefficient(self) -> float:
        """Factor of the camera vectors."""
        return self.base.sie_coefficient

    def forward(self, images: Tensor, camids: Tensor | None = None) -> ReIDOutputs:
        """Logits and features of a training batch.

        Args:
            images: [B, 3, H, W], normalised; in training mode B is 2 or more.
            camids: [B] int64 cameras from 0; needed by a backbone with camera vectors only.

        Raises:
            DataError: as `VisionTransformer.embed`.
        """
        features = self.base.embed(images, camids)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.classifier(self.dropout(self.bottleneck(features)))
        return ReIDOutputs(logits, features)

    def embed(self, images: Tensor, camids: Tensor | None = None) -> Tensor:
        """Features [B, D] for retrieval, as `neck_feat` says. Arguments and errors as `forward`."""
        features = self.base.embed(images, camids)
        if self.neck_feat == "before":
            return features
        with torch.autocast(features.device.type, enabled=False):
            normed: Tensor = self.bottleneck(features)
        return normed
