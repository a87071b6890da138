"""Generated persons: pictures to learn from where no data set is at hand."""

from __future__ import annotations

from personvit.data.generated.card import DataCard
from personvit.data.generated.config import RENDERER_VERSION, GeneratedConfig
from personvit.data.generated.dataset import ensure_generated, generate

__all__ = ["RENDERER_VERSION", "DataCard", "GeneratedConfig", "ensure_generated", "generate"]
