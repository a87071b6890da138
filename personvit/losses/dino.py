"""Self-distillation on the CLS token (DINO, arXiv 2104.14294, as in bytedance/ibot main_ibot.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from personvit.losses.centering import TeacherTargets
from personvit.ops import distill_cross_entropy


class DINOLoss(TeacherTargets):
    """Cross entropy between teacher views and all other student views.

    The published loss is the mean over all pairs of a teacher view q and a student view v != q: 18 terms for 2 global
    and 8 local crops.

    State dict: `center` [1, K]. Arguments: those of `TeacherTargets`.
    """

    centre_name = "center"
    centre_axes = 2

    def forward(self, student_cls: Tensor, teacher_cls: Tensor, views: int, teacher_temp: float) -> Tensor:
        """Mean cross entropy over images and over pairs of different views.

        Where gradients are enabled, that is in training, the teacher's logits are added to the next centre.

        Args:
            student_cls: [views * B, K] logits, crop-major, global crops first.
            teacher_cls: [2B, K] raw logits of the global crops, same order.
            views: crops per image that the student sees, 2 + L.
            teacher_temp: teacher temperature of this epoch.

        Returns:
            Scalar float32.
        """
        images = len(student_cls) // views
        offset = self.offset(teacher_cls, teacher_temp)
        loss, column_sum = distill_cross_entropy(
            student_cls, teacher_cls, offset, self.student_temp, teacher_temp, images, exclude_own=True
        )
        if torch.is_grad_enabled():
            self._add(column_sum, len(teacher_cls))
        return loss / (len(teacher_cls) * (views - 1))
