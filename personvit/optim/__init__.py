"""Parameter groups, schedules per step, gradient clipping."""

from __future__ import annotations

from personvit.optim.clip import clip_gradients
from personvit.optim.param_groups import param_groups
from personvit.optim.schedules import Schedules, build_schedules, cosine_schedule

__all__ = ["Schedules", "build_schedules", "clip_gradients", "cosine_schedule", "param_groups"]
