"""The pre-training loader that needs nothing but torch: Pillow and torchvision in the processes of a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from personvit.data.batches import BatchPlan, CropBatch, first_readable
from personvit.data.crops import MultiCrop
from personvit.data.sources import ImageSource
from personvit.data.torch_reader import read_with_processes


class TorchLoader:
    """The micro-batches of one rank for one epoch, in order. Iterating again starts over.

    Attributes:
        steps: optimiser steps of the whole epoch.

    Args:
        plan: what the batches hold.
        source: images.
        start_step: first optimiser step to give.
    """

    def __init__(self, plan: BatchPlan, source: ImageSource, start_step: int) -> None:
        self.steps = plan.steps
        self._plan, self._source = plan, source
        self._micro_batches = plan.micro_batches(start_step)
        self._crops = MultiCrop(plan.cfg.crops)

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[CropBatch]:
        return read_with_processes(self._assemble, self._micro_batches, self._plan.cfg.data)

    def _assemble(self, micro: int) -> CropBatch:
        global_crops: list[list[Tensor]] = []
        local_crops: list[list[Tensor]] = []
        used: list[int] = []
        bad: list[str] = []
        for position, wanted in enumerate(self._plan.images(micro), start=self._plan.first_position(micro)):
            index, image = first_readable(self._source, wanted, self._source.load, bad)
            views = self._crops(image, self._plan.crops_seed, position)
            global_crops.append(views[0])
            local_crops.append(views[1])
            used.append(index)
        local = _crop_major(local_crops) if self._plan.cfg.crops.local_crops else None
        return self._plan.collate(micro, _crop_major(global_crops), local, used, bad)


def _crop_major(views: Sequence[Sequence[Tensor]]) -> Tensor:
    """[images][crops] of [3, H, W] -> [crops * images, 3, H, W]."""
    return torch.stack([image[number] for number in range(len(views[0])) for image in views])
