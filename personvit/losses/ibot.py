"""Self-distillation on masked patch tokens (iBOT, arXiv 2111.07832, as in bytedance/ibot main_ibot.py)."""

from __future__ import annotations

from torch import Tensor

from personvit.losses.centering import TeacherTargets
from personvit.ops import distill_cross_entropy


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
            student_patch: [M, K'] logits of masked patches and of padding, M may be 0.
            teacher_patch: [M, K'] raw logits of the same patches.
            mask_weights: [M] float32, 1 / masked patches of the crop; 0 for padding, which then changes nothing.
            crops: number of global crops 2B, those without a mask included.
            teacher_temp: teacher temperature for patches of this epoch.

        Returns:
            Scalar float32, 0 (with a gradient of 0) if nothing is masked.
        """
        offset = self.offset(teacher_patch, teacher_temp, mask_weights > 0)
        images = len(student_patch)  # a patch is compared with the teacher's view of itself, and with no other
        loss, _ = distill_cross_entropy(
            student_patch, teacher_patch, offset, self.student_temp, teacher_temp, images, False, mask_weights
        )
        return loss / crops

    def accumulate(self, teacher_patch_mean: Tensor, crops: int) -> None:
        """Add a micro-batch to the next centre.

        Args:
            teacher_patch_mean: [K'] mean raw logit over ALL patches of its global crops, masked or not.
            crops: number of global crops that the mean was taken over.
        """
        self._add(teacher_patch_mean.detach().float() * crops, crops)
