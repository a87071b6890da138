"""Student and teacher of the self-distillation: what each network sees, and what the losses get.

The step is that of bytedance/ibot main_ibot.py, rearranged without changing its value: all student crops travel as one
token stream, only masked patch tokens enter the student's head, patch tokens of local crops never do, and the
teacher's mean patch logit is taken in the bottleneck, because the last layer is linear.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personvit.config import PretrainConfig
from personvit.models.heads import ProjectionHead
from personvit.models.vit import VisionTransformer, build_vit, cls_rows, patch_rows
from personvit.models.weights import load_into

_log = logging.getLogger(__name__)


class Crops(Protocol):
    """The fields of a batch that the networks read (`personvit.data.loaders.CropBatch` has them)."""

    @property
    def global_crops(self) -> Tensor:
        """[2B, 3, H, W], crop-major."""

    @property
    def local_crops(self) -> Tensor | None:
        """[L*B, 3, h, w], crop-major, or None."""

    @property
    def masks(self) -> Tensor:
        """[2B, N] bool."""

    @property
    def mask_indices(self) -> Tensor:
        """[M] int64, flat over 2B*N; masked patches, and padding behind them."""


@dataclass(frozen=True)
class SSLOutputs:
    """Logits (compute dtype) and features of one micro-batch of B images and L local crops each."""

    student_cls: Tensor
    """[(2 + L) * B, K], crop-major."""
    student_patch: Tensor
    """[M, K'], masked patches only, and padding behind them."""
    teacher_cls: Tensor
    """[2B, K]."""
    teacher_patch: Tensor
    """[M, K'], the same patches."""
    teacher_patch_mean: Tensor
    """[K'] float32: mean logit over all 2B*N patches, masked or not; what the patch centre is made of."""
    teacher_features: Tensor
    """[2B, D]: CLS tokens after the final norm."""
    student_features: Tensor
    """[2B, D]: the same of the student's global crops."""


class Network(nn.Module):
    """Backbone and head. Its forward is the student's, so that DistributedDataParallel can wrap it."""

    def __init__(self, backbone: VisionTransformer, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(
        self, global_crops: Tensor, local_crops: Tensor | None, masks: Tensor, mask_indices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All crops of a micro-batch.

        Args:
            global_crops: [2B, 3, H, W].
            local_crops: [L*B, 3, h, w] or None.
            masks: [2B, N] bool.
            mask_indices: [M] int64, flat over 2B*N.

        Returns:
            CLS logits [(2 + L) * B, K], logits of masked patches [M, K'], CLS tokens of the global crops [2B, D].
        """
        crops = [global_crops] if local_crops is None else [global_crops, local_crops]
        crop_masks: list[Tensor | None] = [masks] if local_crops is None else [masks, None]
        patches = masks.shape[1]
        groups = [(len(global_crops), 1 + patches)]
        if local_crops is not None:
            groups.append((len(local_crops), 1 + self.backbone.patches_of(local_crops)))
        cls_positions = cls_rows(groups, masks.device)
        rows = torch.cat([cls_positions, patch_rows(mask_indices, patches)])
        tokens = self.backbone.forward_rows(crops, crop_masks, rows)  # [(2 + L) * B + M, D]
        cls_tokens, masked = tokens[: len(cls_positions)], tokens[len(cls_positions) :]
        cls_logits, patch_logits = self.head(cls_tokens, masked)
        return cls_logits, patch_logits, cls_tokens[: len(global_crops)]


class StudentTeacher(nn.Module):
    """Student, and a teacher that is the moving average of it.

    `student` may be replaced by a wrapper of itself (DistributedDataParallel). The teacher starts as a copy of the
    student, has no drop path and no mask token, stays in evaluation mode and gets no gradient.

    Args:
        cfg: the whole pre-training configuration (crops, model and head are read). With `model.weights` both backbones
            start from that file, otherwise from random weights.

    Raises:
        CheckpointError: `model.weights` cannot be used.
    """

    def __init__(self, cfg: PretrainConfig) -> None:
        super().__init__()
        student = _build_network(cfg, student=True)
        if cfg.model.weights is not None:
            _log.info("initial backbone\n%s", load_into(student.backbone, cfg.model.weights).table())
        self.student: nn.Module = student
        self.teacher = _build_network(cfg, student=False)
        names = self.teacher.state_dict().keys()
        self.teacher.load_state_dict({k: v for k, v in self.student.state_dict().items() if k in names})
        self.teacher.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> StudentTeacher:
        """Set the student's mode; the teacher always evaluates."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Crops) -> SSLOutputs:
        """Run both networks on a micro-batch; autocast is the caller's."""
        student_cls, student_patch, student_features = self.student(
            batch.global_crops, batch.local_crops, batch.masks, batch.mask_indices
        )
        teacher_cls, teacher_patch, patch_mean, teacher_features = self._run_teacher(
            batch.global_crops, batch.mask_indices
        )
        return SSLOutputs(
            student_cls=student_cls,
            student_patch=student_patch,
            teacher_cls=teacher_cls,
            teacher_patch=teacher_patch,
            teacher_patch_mean=patch_mean,
            teacher_features=teacher_features,
            student_features=student_features,
        )

    @torch.no_grad()
    def _run_teacher(self, global_crops: Tensor, mask_indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """CLS logits [2B, K], logits of masked patches [M, K'], mean patch logit [K'], CLS tokens [2B, D]."""
        backbone, head = self.teacher.backbone, self.teacher.head
        tokens = backbone(global_crops)
        vectors = head.bottleneck(tokens)  # [2B, 1 + N, bottleneck]
        cls_matrix, patch_matrix = head.prototype_matrices()
        cls_logits = F.linear(vectors[:, 0], cls_matrix)
        masked = vectors.flatten(0, 1).index_select(0, patch_rows(mask_indices, tokens.shape[1] - 1))
        patch_logits = F.linear(masked, patch_matrix)
        # The mean logit over all patches equals the logit of the mean vector; in float32, as the centre is.
        with torch.autocast(tokens.device.type, enabled=False):
            patch_mean = F.linear(vectors[:, 1:].mean(dim=(0, 1)), patch_matrix)
        return cls_logits, patch_logits, patch_mean, tokens[:, 0]

    def teacher_of(self) -> dict[Tensor, Tensor]:
        """The teacher's tensor of each student parameter that both have; the mask token is the student's own."""
        students = {_plain_name(name): parameter for name, parameter in self.student.named_parameters()}
        return {students[name]: average for name, average in self.teacher.named_parameters() if name in students}


def _plain_name(name: str) -> str:
    """Parameter name without the prefixes of DistributedDataParallel and torch.compile."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _build_network(cfg: PretrainConfig, student: bool) -> Network:
    backbone = build_vit(
        cfg.model.arch,
        img_size=cfg.crops.global_size,
        patch_size=cfg.model.patch_size,
        drop_path_rate=cfg.model.drop_path if student else 0.0,
        masked_embed=student,
    )
    head = ProjectionHead(
        backbone.embed_dim,
        prototypes=cfg.head.prototypes,
        patch_prototypes=cfg.head.patch_prototypes,
        shared=cfg.head.shared,
        hidden_dim=cfg.head.hidden_dim,
        bottleneck_dim=cfg.head.bottleneck_dim,
        norm_last_layer=cfg.head.norm_last_layer,
    )
    return Network(backbone, head)
