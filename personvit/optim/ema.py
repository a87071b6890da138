"""The teacher as a moving average of the student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(averages: Sequence[Tensor], values: Sequence[Tensor], momentum: float) -> None:
    """In place: average <- momentum * average + (1 - momentum) * value, one launch for all tensors."""
    if averages:
        torch._foreach_lerp_(list(averages), list(values), 1.0 - momentum)
