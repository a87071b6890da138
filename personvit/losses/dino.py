"""Self-distillation on the CLS token (DINO, arXiv 2104.14294, as in bytedance/ibot main_ibot.py)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from personvit.losses.centering import TeacherTargets


class DINOLoss(TeacherTargets):
    """Cross entropy between teacher views and all other student views.

    The published loss is the mean over all pairs of a teacher view q and a student view v != q (18 terms for 2 global
    and 8 local crops). The cross entropy is linear in log-softmax, so one log-softmax per student view is enough:
    sum over v != q of log p_v = (sum over all v) - log p_q.

    State dict: `center` [1, K]. Arguments: those of `TeacherTargets`.
    """

    centre_name = "center"
    centre_axes = 2

    def forward(self, student_cls: Tensor, teacher_cls: Tensor, views: int, teacher_temp: float) -> Tensor:
        """Mean cross entropy over images and over pairs of different views.

        Args:
            student_cls: [views * B, K] logits, crop-major, global crops first.
            teacher_cls: [2B, K] raw logits of the global crops, same order.
            views: crops per image that the student sees, 2 + L.
            teacher_temp: teacher temperature of this epoch.

        Returns:
            Scalar float32.
        """
        images = len(student_cls) // views
        teacher_views = len(teacher_cls) // images
        probabilities = self.targets(teacher_cls, teacher_temp).view(teacher_views, images, -1)
        log_student = F.log_softmax(student_cls.float() / self.student_temp, dim=-1).view(views, images, -1)
        others = log_student.sum(dim=0) - log_student[:teacher_views]  # [2, B, K]: sum of all other views
        return -(probabilities * others).sum() / (images * teacher_views * (views - 1))

    def accumulate(self, teacher_cls: Tensor) -> None:
        """Add raw teacher logits [2B, K] of a micro-batch to the next centre."""
        self._add(teacher_cls.detach().float().sum(dim=0), len(teacher_cls))
