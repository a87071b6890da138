"""Cross entropy on the identities of the training set (hustvl/PersonViT transreid_pytorch, loss/softmax_loss.py)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class IdentityLoss(nn.Module):
    """Cross entropy of the classifier, mean over the batch.

    Args:
        label_smoothing: eps; the target is then (1 - eps) * one-hot + eps / ids.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy.

        Args:
            logits: [B, ids], any floating dtype; computed in float32 or wider, under autocast too.
            labels: [B] int64, 0 to ids - 1.

        Returns:
            Scalar float32 (float64 for float64 logits).
        """
        wide = logits.float() if logits.element_size() < 4 else logits
        return F.cross_entropy(wide, labels, label_smoothing=self.label_smoothing)
