"""Losses of the self-supervised pre-training."""

from __future__ import annotations

from personvit.losses.centering import sinkhorn_knopp, temperature_schedule
from personvit.losses.dino import DINOLoss
from personvit.losses.ibot import IBOTPatchLoss

__all__ = ["DINOLoss", "IBOTPatchLoss", "sinkhorn_knopp", "temperature_schedule"]
