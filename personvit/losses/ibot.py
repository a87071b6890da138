"""Self-distillation on masked patch tokens (iBOT, arXiv 2111.07832, as in bytedance/ibot main_ibot.py)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from personvit.losses.centering import TeacherTargets


class IBOTPatchLoss(TeacherTargets):
    """Cross entropy between teacher and student on the masked patches of the same global crop.

    Published form: per crop the mean over its masked patches (0 if none), then the mean over crops and the two views.
    Only masked patches are given here, each with the weight 1 / (masked patches of its crop); the sum over the number
    of crops is the same value.

    State dict: `center2` [1, 1, K']. Arguments: those of `TeacherTargets`.
    """

    centre_name = "center2"
    centre_axes = 3

    def forward(
        self, student_patch: Tensor, teacher_patch: Tensor, mask_weights: Tensor, crops: int, teacher_temp: float
    ) -> Tensor:
        """Mean over crops of the mean cross entropy of their masked patches.

        Args:
            student_patch: [M, K'] logits of masked patches, M may be 0.
            teacher_patch: [M, K'] raw logits of the same patches.
            mask_weights: [M] float32, 1 / masked patches of the crop.
            crops: number of global crops 2B, those without a mask included.
            teacher_temp: teacher temperature for patches of this epoch.

        Returns:
            Scalar float32, 0 (with a gradient of 0) if nothing is masked.
        """
        probabilities = self.targets(teacher_patch, teacher_temp)
        log_student = F.log_softmax(student_patch.float() / self.student_temp, dim=-1)
        per_patch = -(probabilities * log_student).sum(dim=-1)  # [M]
        return (per_patch * mask_weights).sum() / crops

    def accumulate(self, teacher_patch_mean: Tensor, crops: int) -> None:
        """Add a micro-batch to the next centre.

        Args:
            teacher_patch_mean: [K'] mean raw logit over ALL patches of its global crops, masked or not.
            crops: number of global crops that the mean was taken over.
        """
        self._add(teacher_patch_mean.detach().float() * crops, crops)
