"""Batches for pre-training. What a batch holds is a function of (seed, epoch, step), and of nothing else.

Within an epoch the images take *positions* 0, 1, 2 ... in a random order. Step s owns the positions
[s * batch_size, (s + 1) * batch_size); accumulation and ranks cut that range into equal parts, micro-batch by
micro-batch, rank by rank. Crops and masks are seeded by position. So neither the number of workers, nor that of ranks
or micro-batches, nor where a run was interrupted, changes what is learned from.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import signal
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from personvit.config import PretrainConfig
from personvit.data.crops import MultiCrop
from personvit.data.masks import BlockMaskGenerator
from personvit.data.sources import ImageSource
from personvit.errors import ConfigError, DataError, PersonViTError
from personvit.runtime.seed import stream_seed

logger = logging.getLogger(__name__)

MAX_WORKERS = 16
MAX_UNREADABLE = 32
"""So many unreadable files in a row mean that the source itself is broken."""

READER_GRACE_S = 60
"""Seconds that a reader process works on after SIGTERM."""

_ORDER, _CROPS, _MASKS = 0, 1, 2  # separate random streams of one (seed, epoch)


@dataclass(frozen=True)
class CropBatch:
    """One micro-batch of one rank: B images, two global and L local crops of each.

    Crop-major means view by view: rows 0 ... B-1 are the first global crop of every image, rows B ... 2B-1 the
    second, and likewise for the local crops. N is the number of patches of a global crop.

    Attributes:
        global_crops: [2B, 3, H, W] float32, normalised, crop-major.
        local_crops: [L*B, 3, h, w] float32, normalised, crop-major; None if there are no local crops.
        masks: [2B, N] bool, True = hidden from the student.
        mask_indices: [M] int64, the masked patches' places in the flattened [2B * N], ascending.
        mask_weights: [M] float32, 1 / number of masked patches of the patch's crop.
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

    def to(self, device: torch.device | str) -> CropBatch:
        """The batch with every tensor on `device`; copies from pinned memory do not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> CropBatch:
        """The batch in page-locked memory (called by the DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

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


class PretrainLoader:
    """The micro-batches of one rank for one epoch, in order. Iterating again starts over.

    Attributes:
        steps: optimiser steps of the whole epoch.
    """

    def __init__(self, dataset: _MicroBatches, start_step: int, steps: int, num_workers: int, prefetch: int) -> None:
        self.steps = steps
        accumulate = dataset.cfg.train.accumulate
        self._plan = range(start_step * accumulate, steps * accumulate)
        self._loader: DataLoader[CropBatch | PersonViTError] = DataLoader(
            dataset,
            batch_size=None,  # an item is a whole micro-batch already
            sampler=self._plan,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_outlive_signals if num_workers else None,
            # Its own generator: the DataLoader would otherwise draw a seed (unused here) from the global one, and a
            # resumed run, which opens its loader at another moment, would drift from the uninterrupted one.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[CropBatch]:
        batches = self._checked(iter(self._loader))
        # Close what a program leaves open at its end, before multiprocessing waits for readers that have no orders.
        atexit.register(_close, weakref.ref(batches))
        return batches

    @staticmethod
    def _checked(items: Iterator[CropBatch | PersonViTError]) -> Generator[CropBatch, None, None]:
        try:
            for item in items:
                if isinstance(item, PersonViTError):
                    raise item
                yield item
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a reader process died ({error}). Most often memory ran out, or the shared memory of a container "
                f"(raise it with docker run --shm-size=8g). Try data.num_workers=2 data.prefetch=1, or "
                f"data.num_workers=0."
            ) from None
        finally:
            del items  # the readers end now, even where a traceback keeps this frame


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
        DataError: fewer images than one batch; while iterating: `MAX_UNREADABLE` unreadable files in a row, or a
            reader process died.
    """
    batch_size, parts = cfg.train.batch_size, world_size * cfg.train.accumulate
    if batch_size < parts or batch_size % parts:
        fitting = max(parts, batch_size // parts * parts)
        raise ConfigError(
            f"train.batch_size={batch_size} does not divide into {parts} equal parts ({world_size} ranks x "
            f"train.accumulate={cfg.train.accumulate}): every rank needs the same number of images, at least one. "
            f"Set train.batch_size={fitting}, or start fewer ranks."
        )
    steps = steps_per_epoch(cfg, source)
    num_workers = reader_count(cfg.data.num_workers)
    if cfg.data.loader == "auto":
        _announce(num_workers)
    enabled = masks_enabled and epoch >= cfg.masks.start_epoch
    dataset = _MicroBatches(cfg, source, rank, world_size, epoch, steps, enabled)
    return PretrainLoader(dataset, start_step, steps, num_workers, cfg.data.prefetch)


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


class _MicroBatches(Dataset["CropBatch | PersonViTError"]):
    """Item i = micro-batch i of this rank in this epoch, or the error that prevented it.

    Errors travel as values: raised in a worker they would reach the user as a traceback wrapped in a traceback.
    """

    def __init__(
        self,
        cfg: PretrainConfig,
        source: ImageSource,
        rank: int,
        world_size: int,
        epoch: int,
        steps: int,
        masks_enabled: bool,
    ) -> None:
        self.cfg = cfg
        self._source = source
        self._rank, self._world_size, self._epoch = rank, world_size, epoch
        self._masks_enabled = masks_enabled
        self._size = cfg.train.batch_size // (world_size * cfg.train.accumulate)
        self._crops = MultiCrop(cfg.crops)
        height, width = cfg.crops.global_size
        patch = cfg.model.patch_size
        self._masks = BlockMaskGenerator(cfg.masks, (height // patch, width // patch))
        generator = np.random.Generator(np.random.PCG64(stream_seed(cfg.train.seed, _ORDER, epoch)))
        self._order = generator.permutation(len(source))[: steps * cfg.train.batch_size]  # position -> image

    def __getitem__(self, micro: int) -> CropBatch | PersonViTError:
        first = (micro * self._world_size + self._rank) * self._size
        try:
            return self._assemble(first)
        except PersonViTError as error:
            return error

    def _assemble(self, first: int) -> CropBatch:
        seed = self.cfg.train.seed
        global_crops: list[list[Tensor]] = []
        local_crops: list[list[Tensor]] = []
        used: list[int] = []
        bad: list[str] = []
        for position in range(first, first + self._size):
            index, image = _load_readable(self._source, int(self._order[position]), bad)
            views = self._crops(image, stream_seed(seed, _CROPS, self._epoch, position))
            global_crops.append(views[0])
            local_crops.append(views[1])
            used.append(index)
        masks = self._draw_masks(first)
        indices = masks.flatten().nonzero().flatten()
        counts = masks.sum(1)
        return CropBatch(
            global_crops=_crop_major(global_crops),
            local_crops=_crop_major(local_crops) if self.cfg.crops.local_crops else None,
            masks=masks,
            mask_indices=indices,
            mask_weights=1.0 / counts[indices // masks.shape[1]].float(),
            positions=torch.tensor(used, dtype=torch.int64),
            bad=bad,
        )

    def _draw_masks(self, first: int) -> Tensor:
        """[2B, N] bool, crop-major. Crop 2p + v of the stream belongs to view v at position p."""
        seed = stream_seed(self.cfg.train.seed, _MASKS, self._epoch)
        masks = self._masks(2 * self._size, seed, first=2 * first, enabled=self._masks_enabled)
        return masks.view(self._size, 2, -1).transpose(0, 1).reshape(2 * self._size, -1)


def _crop_major(views: Sequence[Sequence[Tensor]]) -> Tensor:
    """[images][crops] of [3, H, W] -> [crops * images, 3, H, W]."""
    return torch.stack([image[number] for number in range(len(views[0])) for image in views])


def _load_readable(source: ImageSource, index: int, bad: list[str]) -> tuple[int, Image.Image]:
    """Image `index`, or the next readable one after it; the paths that could not be read are added to `bad`."""
    for offset in range(MAX_UNREADABLE):
        candidate = (index + offset) % len(source)
        try:
            return candidate, source.load(candidate)
        except DataError as error:
            last = error
            bad.append(source.path(candidate))
    raise DataError(
        f"{MAX_UNREADABLE} files in a row are unreadable, up to {last}. Is the storage still mounted, and are these "
        f"images? List the damaged ones with: personvit data check data.root={os.path.dirname(bad[-1])}"
    )


def reader_count(wanted: int) -> int:
    """Reader processes: as asked, or the cores that this process may use, at most `MAX_WORKERS`, less one."""
    if wanted >= 0:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores) - 1


@functools.cache
def _announce(num_workers: int) -> None:
    """Say once, not every epoch, which loader `auto` stands for."""
    logger.info("data.loader=auto -> torchvision (the loader that is built in), %d reader processes", num_workers)


def _outlive_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group, but only the main process may answer them.

    It still needs its readers for the step it is in. They end when it closes the loader or is gone; the alarm ends
    them if it does neither.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(READER_GRACE_S))


def _close(batches: weakref.ref[Generator[CropBatch, None, None]]) -> None:
    generator = batches()
    if generator is not None:
        generator.close()
