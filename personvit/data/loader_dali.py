"""The pre-training loader on DALI: decodes and cuts in a pipeline, colours whole batches of views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from personvit.data.batches import BatchPlan, CropBatch, first_readable
from personvit.data.dali_input import plain_jpeg_size
from personvit.data.dali_reader import DaliOrder, Spread, read_with_dali, thread_count
from personvit.data.photometry import Photometry
from personvit.data.sources import ImageSource
from personvit.data.views import ViewParameters, draw_views

__all__ = ["DaliLoader", "plain_jpeg_size", "thread_count"]

_Loaded = TypeVar("_Loaded")


class DaliLoader:
    """The micro-batches of one rank for one epoch, in order. Iterating again starts over.

    Attributes:
        steps: optimiser steps of the whole epoch.

    Args:
        plan: what the batches hold.
        source: images. Its `read` is called from several threads.
        start_step: first optimiser step to give.
        device: where views are made and batches lie: the CPU, or a CUDA device.
    """

    def __init__(self, plan: BatchPlan, source: ImageSource, start_step: int, device: torch.device) -> None:
        self.steps = plan.steps
        self._plan, self._source, self._device = plan, source, device
        self._micro_batches = plan.micro_batches(start_step)

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[CropBatch]:
        crops = _CropPlan(self._plan, self._source, self._device)
        return read_with_dali(crops, self._micro_batches, self._plan.cfg.data, self._device)


class _CropPlan:
    """A `DaliPlan` whose keys are numbers of micro-batches."""

    def __init__(self, plan: BatchPlan, source: ImageSource, device: torch.device) -> None:
        self.source = source
        self.size = plan.size
        self.views = 2 + plan.cfg.crops.local_crops
        self._plan, self._device = plan, device
        self._photometry = Photometry(plan.cfg.crops, device)

    def images(self, micro: int) -> list[int]:
        return self._plan.images(micro)

    def readable(self, index: int, load: Callable[[int], _Loaded], bad: list[str]) -> tuple[int, _Loaded]:
        return first_readable(self.source, index, load, bad)

    def order(self, micro: int, image_sizes: np.ndarray, used: list[int], bad: list[str]) -> DaliOrder[CropBatch]:
        crops = self._plan.cfg.crops
        p = draw_views(crops, image_sizes, self._plan.crops_seed, self._plan.first_position(micro))
        sizes = np.empty((*p.top.shape, 2), dtype=np.float32)
        sizes[:, :2], sizes[:, 2:] = crops.global_size, crops.local_size
        sizes[..., 1] *= np.where(p.flip, -1, 1)
        return DaliOrder(
            boxes=np.stack([p.top, p.left, p.top + p.height, p.left + p.width], axis=-1).astype(np.float32),
            sizes=sizes,
            finish=lambda views, spread: self._finish(views, spread, micro, p, used, bad),
        )

    def _finish(
        self,
        views: list[Tensor],
        spread: Spread,
        micro: int,
        parameters: ViewParameters,
        used: list[int],
        bad: list[str],
    ) -> CropBatch:
        global_crops = self._colour(views[:2], spread, parameters.views(slice(0, 2)))
        local_crops = self._colour(views[2:], spread, parameters.views(slice(2, None))) if len(views) > 2 else None
        return self._plan.collate(micro, global_crops, local_crops, used, bad)

    def _colour(self, views: list[Tensor], spread: Spread, parameters: ViewParameters) -> Tensor:
        """Finish views of one size, each [B, 3, H, W] uint8, and put them one after the other."""
        out = torch.empty(len(views) * self.size, *views[0].shape[1:], device=self._device)
        spread(
            self._photometry,
            [
                (view, parameters.views(slice(number, number + 1)), out[number * self.size : (number + 1) * self.size])
                for number, view in enumerate(views)
            ],
        )
        return out
