"""Backbones, heads, the student-teacher pair and their weights."""

from __future__ import annotations

from personvit.models.heads import ProjectionHead
from personvit.models.ssl import SSLOutputs, StudentTeacher
from personvit.models.vit import VisionTransformer, build_vit, vit_base, vit_micro, vit_small, vit_tiny
from personvit.models.weights import WeightsInfo, load_backbone, load_into, load_model, save_backbone

__all__ = [
    "ProjectionHead",
    "SSLOutputs",
    "StudentTeacher",
    "VisionTransformer",
    "WeightsInfo",
    "build_vit",
    "load_backbone",
    "load_into",
    "load_model",
    "save_backbone",
    "vit_base",
    "vit_micro",
    "vit_small",
    "vit_tiny",
]
