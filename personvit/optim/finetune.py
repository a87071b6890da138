"""Optimiser of the fine-tuning (hustvl/PersonViT transreid_pytorch, solver/make_optimizer.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from personvit.config import FinetuneOptimConfig

ADAMW_BETAS = (0.9, 0.999)


def finetune_groups(model: nn.Module, cfg: FinetuneOptimConfig) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: weights, and biases.

    The published rule goes by names: what has `bias` in its name learns `cfg.bias_lr_factor` times as fast. Everything
    is decayed, norms, CLS token and positions included. The frozen bias of the neck is in neither group.

    Returns:
        [weights, biases], each with `lr` and `weight_decay`; the columns of `finetune_lr` are theirs.
    """
    weights: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (biases if "bias" in name else weights).append(parameter)
    return [
        {"params": weights, "lr": cfg.lr, "weight_decay": cfg.weight_decay},
        {"params": biases, "lr": cfg.lr * cfg.bias_lr_factor, "weight_decay": cfg.weight_decay_bias},
    ]


def build_finetune_optimizer(model: nn.Module, cfg: FinetuneOptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum (published) or AdamW over `finetune_groups`; the loop sets their rates by `finetune_lr`.

    SGD is torch's: no Nesterov, no dampening, and the decay is part of the gradient that the momentum averages.
    """
    groups = finetune_groups(model, cfg)
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=ADAMW_BETAS)
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum)
