"""Which parameters get weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def param_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: with weight decay, and without.

    The rule of bytedance/ibot utils.py (get_params_groups): biases and 1-D tensors are not decayed. CLS token,
    positions, mask token and prototypes therefore are.

    Returns:
        [decayed, not decayed]; the second carries `weight_decay` 0. The schedule belongs to the first only.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
