"""Losses of the self-supervised pre-training and of the fine-tuning."""

from __future__ import annotations

from personvit.losses.centering import sinkhorn_knopp, temperature_schedule
from personvit.losses.dino import DINOLoss
from personvit.losses.ibot import IBOTPatchLoss
from personvit.losses.identity import IdentityLoss
from personvit.losses.triplet import HardestPairs, TripletLoss, hardest_pairs

__all__ = [
    "DINOLoss",
    "HardestPairs",
    "IBOTPatchLoss",
    "IdentityLoss",
    "TripletLoss",
    "hardest_pairs",
    "sinkhorn_knopp",
    "temperature_schedule",
]
