"""Parameter groups, schedules, gradient clipping, and the step of optimiser and teacher."""

from __future__ import annotations

from personvit.optim.adamw_ema import AdamWEma, trained_parameters
from personvit.optim.clip import clip_coefficients, clip_gradients
from personvit.optim.ema import ema_update
from personvit.optim.finetune import build_finetune_optimizer, finetune_groups
from personvit.optim.param_groups import param_groups
from personvit.optim.schedules import Schedules, build_schedules, cosine_schedule, finetune_lr

__all__ = [
    "AdamWEma",
    "Schedules",
    "build_finetune_optimizer",
    "build_schedules",
    "clip_coefficients",
    "clip_gradients",
    "cosine_schedule",
    "ema_update",
    "finetune_groups",
    "finetune_lr",
    "param_groups",
    "trained_parameters",
]
