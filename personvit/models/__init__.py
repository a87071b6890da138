"""Backbones, heads, the student-teacher pair and their weights."""

from __future__ import annotations

from personvit.models.heads import ProjectionHead
from personvit.models.reid import ReIDModel, ReIDOutputs
from personvit.models.ssl import SSLOutputs, StudentTeacher
from personvit.models.vit import VisionTransformer, build_vit, vit_base, vit_micro, vit_small, vit_tiny
from personvit.models.weight_info import WeightsInfo
from personvit.models.weights import (
    load_backbone,
    load_into,
    load_model,
    load_network,
    load_reid,
    save_backbone,
    save_reid,
)

__all__ = [
    "ProjectionHead",
    "ReIDModel",
    "ReIDOutputs",
    "SSLOutputs",
    "StudentTeacher",
    "VisionTransformer",
    "WeightsInfo",
    "build_vit",
    "load_backbone",
    "load_into",
    "load_model",
    "load_network",
    "load_reid",
    "save_backbone",
    "save_reid",
    "vit_base",
    "vit_micro",
    "vit_small",
    "vit_tiny",
]
