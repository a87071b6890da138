"""The choice of loader for pre-training. All of them give the same images, boxes, flips, factors and masks."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator
from typing import Protocol

import torch

from personvit.config import PretrainConfig
from personvit.data.batches import MAX_UNREADABLE, BatchPlan, CropBatch, steps_per_epoch
from personvit.data.loader_torch import TorchLoader
from personvit.data.sources import ImageSource
from personvit.data.torch_reader import available_cores, reader_count
from personvit.errors import BackendUnavailableError

__all__ = [
    "MAX_UNREADABLE",
    "CropBatch",
    "PretrainLoader",
    "available_cores",
    "build_pretrain_loader",
    "choose_loader",
    "reader_count",
    "steps_per_epoch",
]

logger = logging.getLogger(__name__)

_INSTALL_DALI = "pip install nvidia-dali-cuda130"


class PretrainLoader(Protocol):
    """The micro-batches of one rank for one epoch, in order. Iterating again starts over."""

    steps: int
    """Optimiser steps of the whole epoch."""

    def __len__(self) -> int:
        """Micro-batches left."""

    def __iter__(self) -> Iterator[CropBatch]:
        """From the first step asked for to the end of the epoch."""


def build_pretrain_loader(
    cfg: PretrainConfig,
    source: ImageSource,
    rank: int,
    world_size: int,
    epoch: int,
    start_step: int = 0,
    masks_enabled: bool = True,
) -> PretrainLoader:
    """The micro-batches that a rank works through in an epoch: `train.accumulate` of them for each optimiser step.

    Args:
        cfg: configuration; `train.batch_size` is global.
        source: images.
        rank: of this process.
        world_size: number of ranks.
        epoch: from 0; every epoch has its own order, crops and masks.
        start_step: first optimiser step to give (resuming).
        masks_enabled: False: nothing is masked. Nothing is masked before `masks.start_epoch` either.

    Raises:
        ConfigError: the batch does not divide over ranks and micro-batches.
        BackendUnavailableError: the loader asked for cannot run here.
        DataError: fewer images than one batch; while iterating: `MAX_UNREADABLE` unreadable files in a row, or a
            reader process died.
    """
    plan = BatchPlan(cfg, source, rank, world_size, epoch, masks_enabled)
    name = choose_loader(cfg.data.loader)
    if name == "torchvision":
        return TorchLoader(plan, source, start_step)
    from personvit.data.loader_dali import DaliLoader

    cuda = name == "dali-gpu"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return DaliLoader(plan, source, start_step, device)


@functools.cache  # the reason is logged once, not every epoch
def choose_loader(wanted: str) -> str:
    """dali-gpu, dali-cpu or torchvision for a value of `data.loader`.

    `auto` never measures: a choice that differed between two starts would change what a resumed run sees.

    Raises:
        BackendUnavailableError: the loader asked for cannot run here.
    """
    dali, cuda = _has_dali(), torch.cuda.is_available()
    if wanted == "auto":
        if not dali:
            name, reason = "torchvision", f"DALI is not installed; it is faster: {_INSTALL_DALI}"
        elif cuda:
            name, reason = "dali-gpu", "DALI and a CUDA device are there"
        else:
            name, reason = "dali-cpu", "DALI is there, no CUDA device; on CPUs it is faster than torchvision"
        logger.info("data.loader=auto -> %s (%s)", name, reason)
        return name
    if wanted != "torchvision" and not dali:
        raise BackendUnavailableError(
            f"data.loader={wanted} needs DALI, which is not installed (Linux only). {_INSTALL_DALI}, or use "
            f"data.loader=torchvision."
        )
    if wanted == "dali-gpu" and not cuda:
        raise BackendUnavailableError(
            "data.loader=dali-gpu needs a CUDA device, and torch sees none (nvidia-smi and python -m personvit.env "
            "tell why). Use data.loader=dali-cpu."
        )
    return wanted


def _has_dali() -> bool:
    # nvidia is a namespace package: to ask for a part of it where nothing of it is installed is an error, not None.
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
