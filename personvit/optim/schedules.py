"""Schedules as arrays: of the pre-training a value per optimiser step, of the fine-tuning one per epoch.

Sources: bytedance/ibot utils.py (cosine_scheduler); hustvl/PersonViT transreid_pytorch, solver/cosine_lr.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personvit.config import FinetuneOptimConfig, OptimConfig

Schedule = NDArray[np.float64]


def cosine_schedule(base: float, final: float, steps: int, warmup_steps: int = 0, start: float = 0.0) -> Schedule:
    """Linear warm-up, then half a cosine.

    The cosine is divided by the number of steps after the warm-up, as published: the last step comes close to `final`
    and does not reach it.

    Args:
        base: value at the end of the warm-up.
        final: value that the cosine tends to.
        steps: length of the run.
        warmup_steps: linear from `start` to `base`, both included. Longer than the run: the ramp is cut off.
        start: first value of the warm-up.

    Returns:
        [steps] float64.
    """
    ramp = np.linspace(start, base, warmup_steps, dtype=np.float64)
    rest = max(0, steps - warmup_steps)
    phase = np.pi * np.arange(rest, dtype=np.float64) / max(1, rest)
    return np.concatenate([ramp, final + 0.5 * (base - final) * (1 + np.cos(phase))])[:steps]


@dataclass(frozen=True)
class Schedules:
    """What changes at every optimiser step; arrays [epochs * steps_per_epoch] float64."""

    lr: Schedule
    weight_decay: Schedule
    momentum: Schedule
    """Of the teacher's moving average."""


def build_schedules(cfg: OptimConfig, batch_size: int, epochs: int, steps_per_epoch: int) -> Schedules:
    """Schedules of a run, laid out over all its epochs (a run that stops early does not compress them).

    Args:
        cfg: peak values; `cfg.lr` is per 256 images.
        batch_size: global.
        epochs: length of the run.
        steps_per_epoch: optimiser steps of an epoch.

    Returns:
        Arrays over epochs * steps_per_epoch steps. A fractional warm-up is rounded to whole steps.
    """
    steps = epochs * steps_per_epoch
    warmup_steps = round(cfg.warmup_epochs * steps_per_epoch)
    return Schedules(
        lr=cosine_schedule(cfg.lr * batch_size / 256, cfg.min_lr, steps, warmup_steps),
        weight_decay=cosine_schedule(*cfg.weight_decay, steps),
        momentum=cosine_schedule(*cfg.momentum, steps),
    )


def finetune_lr(cfg: FinetuneOptimConfig, epochs: int) -> Schedule:
    """Learning rates of the fine-tuning, constant within an epoch.

    With b the peak of a group, t = epoch - 1 and W the warm-up: start + t (b - start) / W before W, then
    low + (b - low) (1 + cos(pi t / epochs)) / 2. The cosine counts from the first epoch, not from the end of the
    warm-up, as published: the rate drops there a little and never reaches b. start and low are shares of `cfg.lr` for
    either group.

    Args:
        cfg: `lr`, `bias_lr_factor`, `warmup_epochs`, `warmup_factor` (start), `min_factor` (low).
        epochs: length of the run.

    Returns:
        [epochs, 2] float64, of weights and biases; row e - 1 is used during epoch e, counted from 1.
    """
    start, low = cfg.warmup_factor * cfg.lr, cfg.min_factor * cfg.lr
    peaks = np.array([cfg.lr, cfg.bias_lr_factor * cfg.lr])
    t = np.arange(epochs, dtype=np.float64)[:, None]  # [epochs, 1]
    ramp = start + t * (peaks - start) / max(1, cfg.warmup_epochs)
    cosine = low + 0.5 * (peaks - low) * (1 + np.cos(np.pi * t / max(1, epochs)))
    return np.where(t < cfg.warmup_epochs, ramp, cosine)
