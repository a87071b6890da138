"""What a batch of pre-training holds: a function of (seed, epoch, step), whichever loader makes it.

Within an epoch the images take *positions* 0, 1, 2 ... in a random order. Step s owns the positions
[s * batch_size, (s + 1) * batch_size); accumulation and ranks cut that range into equal parts, micro-batch by
micro-batch, rank by rank. Crops and masks are seeded by position. So neither the number of workers, nor that of ranks
or micro-batches, nor where a run was interrupted, changes what is learned from.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from personvit.config import PretrainConfig
from personvit.data.masks import BlockMaskGenerator, mask_bound, masked_patches
from personvit.data.sources import ImageSource
from personvit.errors import ConfigError, DataError
from personvit.runtime.seed import stream_seed

MAX_UNREADABLE = 32
"""So many unreadable files in a row mean that the source itself is broken."""

_ORDER, _CROPS, _MASKS = 0, 1, 2  # separate random streams of one (seed, epoch)

_Loaded = TypeVar("_Loaded")


@dataclass(frozen=True)
class CropBatch:
    """One micro-batch of one rank: B images, two global and L local crops of each.

    Crop-major means view by view: rows 0 ... B-1 are the first global crop of every image, rows B ... 2B-1 the
    second, and likewise for the local crops. N is the number of patches of a global crop.

    Attributes:
        global_crops: [2B, 3, H, W] float32, normalised, crop-major.
        local_crops: [L*B, 3, h, w] float32, normalised, crop-major; None if there are no local crops.
        masks: [2B, N] bool, True = hidden from the student.
        mask_indices: [M*] int64, places in the flattened [2B * N]: the masked patches, ascending, then padding: other
            patches, all different (see `pads_masks`).
        mask_weights: [M*] float32, 1 / number of masked patches of the patch's crop; 0 for padding.
        positions: [B] int64, which images of the source these are.
        bad: unreadable files that were replaced by their successors.
    """

    global_crops: Tensor
    local_crops: Tensor | None
    masks: Tensor
    mask_indices: Tensor
    mask_weights: Tensor
    positions: Tensor
    bad: list[str]

    @property
    def masked(self) -> int:
        """M, masked patches: so many of the rows of `mask_indices` are no padding. Waits for the device."""
        return int(self.mask_weights.count_nonzero())

    def to(self, device: torch.device | str) -> CropBatch:
        """The batch with every tensor on `device`; copies from pinned memory do not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> CropBatch:
        """The batch in page-locked memory; what lies on a device already stays there."""
        return self._map(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> CropBatch:
        return CropBatch(
            global_crops=function(self.global_crops),
            local_crops=None if self.local_crops is None else function(self.local_crops),
            masks=function(self.masks),
            mask_indices=function(self.mask_indices),
            mask_weights=function(self.mask_weights),
            positions=function(self.positions),
            bad=self.bad,
        )


class BatchPlan:
    """Which images, crops and masks make each micro-batch of one rank in one epoch.

    Attributes:
        cfg: configuration.
        size: B, images of a micro-batch.
        steps: optimiser steps of the whole epoch.
        crops_seed: seed of the epoch's crops; an image's number in that stream is its position.

    Args:
        cfg: configuration; `train.batch_size` is global.
        source: images.
        rank: of this process.
        world_size: number of ranks.
        epoch: from 0; every epoch has its own order, crops and masks.
        masks_enabled: False: nothing is masked. Nothing is masked before `masks.start_epoch` either.

    Raises:
        ConfigError: the batch does not divide over ranks and micro-batches.
        DataError: fewer images than one batch.
    """

    def __init__(
        self,
        cfg: PretrainConfig,
        source: ImageSource,
        rank: int,
        world_size: int,
        epoch: int,
        masks_enabled: bool = True,
    ) -> None:
        batch_size, parts = cfg.train.batch_size, world_size * cfg.train.accumulate
        if batch_size < parts or batch_size % parts:
            fitting = max(parts, batch_size // parts * parts)
            raise ConfigError(
                f"train.batch_size={batch_size} does not divide into {parts} equal parts ({world_size} ranks x "
                f"train.accumulate={cfg.train.accumulate}): every rank needs the same number of images, at least one. "
                f"Set train.batch_size={fitting}, or start fewer ranks."
            )
        self.cfg = cfg
        self.size = batch_size // parts
        self.steps = steps_per_epoch(cfg, source)
        self.crops_seed = stream_seed(cfg.train.seed, _CROPS, epoch)
        self._masks_seed = stream_seed(cfg.train.seed, _MASKS, epoch)
        self._rank, self._world_size = rank, world_size
        self._masks_enabled = masks_enabled and epoch >= cfg.masks.start_epoch
        height, width = cfg.crops.global_size
        patch = cfg.model.patch_size
        grid = (height // patch, width // patch)
        self._masks = BlockMaskGenerator(cfg.masks, grid)
        padded = self._masks_enabled and pads_masks()
        self._mask_bound = mask_bound(cfg.masks, grid[0] * grid[1], 2 * self.size) if padded else None
        generator = np.random.Generator(np.random.PCG64(stream_seed(cfg.train.seed, _ORDER, epoch)))
        self._order = generator.permutation(len(source))[: self.steps * batch_size]  # position -> image

    def micro_batches(self, start_step: int = 0) -> range:
        """Numbers of the micro-batches from a step to the end of the epoch."""
        accumulate = self.cfg.train.accumulate
        return range(start_step * accumulate, self.steps * accumulate)

    def first_position(self, micro: int) -> int:
        """Position of the first image of a micro-batch; the others follow it."""
        return (micro * self._world_size + self._rank) * self.size

    def images(self, micro: int) -> list[int]:
        """[B] numbers of the images of a micro-batch within the source."""
        first = self.first_position(micro)
        images: list[int] = self._order[first : first + self.size].tolist()
        return images

    def collate(
        self, micro: int, global_crops: Tensor, local_crops: Tensor | None, used: list[int], bad: list[str]
    ) -> CropBatch:
        """Add the masks of a micro-batch to its crops.

        Args:
            micro: its number.
            global_crops: [2B, 3, H, W] float32, crop-major.
            local_crops: [L*B, 3, h, w] float32, crop-major, or None.
            used: [B] the images that were used.
            bad: files that could not be.
        """
        # Crop 2p + v of the stream belongs to view v at position p.
        first = 2 * self.first_position(micro)
        masks = self._masks(2 * self.size, self._masks_seed, first=first, enabled=self._masks_enabled)
        masks = masks.view(self.size, 2, -1).transpose(0, 1).reshape(2 * self.size, -1)
        indices, weights = masked_patches(masks, self._mask_bound)
        return CropBatch(
            global_crops=global_crops,
            local_crops=local_crops,
            masks=masks,
            mask_indices=indices,
            mask_weights=weights,
            positions=torch.tensor(used, dtype=torch.int64),
            bad=bad,
        )


def pads_masks() -> bool:
    """Whether masked patches are padded to a fixed number (`mask_bound`), so that all steps have the same shapes.

    With a CUDA device they are: allocator, compiled blocks and kernels then see one shape. On a CPU a shape costs
    nothing and rows cost time, so there is no padding. In epochs without masks there are no rows at all: shapes change
    once, at `masks.start_epoch`. Loss and gradients are the same either way.
    """
    return torch.cuda.is_available()


def steps_per_epoch(cfg: PretrainConfig, source: ImageSource) -> int:
    """Optimiser steps of one epoch. The images beyond the last whole batch sit out; which ones changes every epoch.

    Raises:
        DataError: fewer images than one batch.
    """
    steps = len(source) // cfg.train.batch_size
    if steps == 0:
        fitting = 1 << (len(source).bit_length() - 1)
        raise DataError(
            f"the source has {len(source)} images, fewer than train.batch_size={cfg.train.batch_size}, so an epoch "
            f"has no step. Set train.batch_size={fitting}, or give more images with data.root."
        )
    return steps


def first_readable(
    source: ImageSource, index: int, load: Callable[[int], _Loaded], bad: list[str]
) -> tuple[int, _Loaded]:
    """`load` of image `index`, or of the next one that it can load; the paths of the others are added to `bad`.

    Returns:
        Number of the image, and what `load` made of it.

    Raises:
        DataError: `MAX_UNREADABLE` in a row cannot be loaded.
    """
    for offset in range(MAX_UNREADABLE):
        candidate = (index + offset) % len(source)
        try:
            return candidate, load(candidate)
        except DataError as error:
            last = str(error)  # the error itself would hold this frame, and through it the caller's
            bad.append(source.path(candidate))
    raise DataError(
        f"{MAX_UNREADABLE} files in a row are unreadable, up to {last}. Is the storage still mounted, and are these "
        f"images? List the damaged ones with: personvit data check data.root={os.path.dirname(bad[-1])}"
    )
