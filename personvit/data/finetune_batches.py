"""What a batch of fine-tuning holds: a function of (seed, epoch, step), whichever loader makes it.

The mini-batches of an epoch are numbered step by step, rank by rank. Image i of mini-batch m has position m * B + i in
the epoch, and what is random about it is drawn by that position.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from personvit.config.finetune import FinetuneConfig
from personvit.data.dali_reader import DaliOrder, Spread
from personvit.data.path_sources import FileSource
from personvit.data.reid_sets import ReIDSplit
from personvit.data.reid_transforms import InputFinish, InputParameters, draw_inputs, resize
from personvit.data.sources import ImageSource
from personvit.errors import DataError
from personvit.runtime.seed import stream_seed

ORDER, INPUTS = 0, 1
"""Separate random streams of one seed."""
_PIECE = 8  # images that a thread finishes at a time

_Loaded = TypeVar("_Loaded")


@dataclass(frozen=True)
class FinetuneBatch:
    """One step of one rank: B images, K of each identity in a row.

    Attributes:
        images: [B, 3, H, W] float32, normalised.
        pids: [B] int64 labels of the identities.
        camids: [B] int64 cameras.
        positions: [B] int64 numbers of the images within the training set.
        bad: unreadable files that were replaced by other images of their identities.
    """

    images: Tensor
    pids: Tensor
    camids: Tensor
    positions: Tensor
    bad: list[str]

    def to(self, device: torch.device | str) -> FinetuneBatch:
        """The batch with every tensor on `device`; copies from pinned memory do not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> FinetuneBatch:
        """The batch in page-locked memory; what lies on a device already stays there."""
        return self._map(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> FinetuneBatch:
        return FinetuneBatch(
            images=function(self.images),
            pids=function(self.pids),
            camids=function(self.camids),
            positions=function(self.positions),
            bad=self.bad,
        )


@dataclass(frozen=True)
class MiniBatch:
    """Which images a rank takes in a step.

    Attributes:
        epoch, step: from 0.
        first: position of the first image in the epoch; the others follow it.
        images: [B] int64 numbers of the images within the training set.
    """

    epoch: int
    step: int
    first: int
    images: np.ndarray

    def __str__(self) -> str:
        return f"{self.step} of epoch {self.epoch}"


class FinetunePlan:
    """How the batches of a rank are made: by `assemble` in reader processes, or as a `DaliPlan`.

    Attributes:
        source: training images.
        size: B, images of a step of one rank.
        views: 1, for DALI.

    Args:
        cfg: configuration; `train.batch_size` is global.
        train: training set.
        world_size: number of ranks.
        device: where batches are finished; reader processes: the CPU.
    """

    def __init__(self, cfg: FinetuneConfig, train: ReIDSplit, world_size: int, device: torch.device) -> None:
        self.source: ImageSource = FileSource(train.paths)
        self.size = cfg.train.batch_size // world_size
        self.views = 1
        self._input, self._seed, self._device = cfg.input, stream_seed(cfg.train.seed, INPUTS), device
        self._pids, self._camids = train.pids, train.camids
        self._finish = InputFinish(cfg.input, device)

    def assemble(self, key: MiniBatch) -> FinetuneBatch:
        """Read, decode and finish a batch, one image after the other."""
        parameters = self._parameters(key)
        images = torch.empty(self.size, 3, *self._input.size, dtype=torch.uint8)
        used: list[int] = []
        bad: list[str] = []
        for number, wanted in enumerate(self.images(key)):
            index, image = self.readable(wanted, self.source.load, bad)
            images[number] = resize(image, self._input.size, bool(parameters.flip[number]))
            used.append(index)
        out = torch.empty(images.shape, device=self._device)
        self._finish(images, parameters, out)
        return self._collate(out, used, bad)

    def images(self, key: MiniBatch) -> list[int]:
        """[B] numbers of the images of a batch."""
        images: list[int] = key.images.tolist()
        return images

    def readable(self, index: int, load: Callable[[int], _Loaded], bad: list[str]) -> tuple[int, _Loaded]:
        """`load` of an image, or of the next one of its identity that it can load; paths of the others go to `bad`.

        Raises:
            DataError: no image of the identity can be loaded.
        """
        failed = len(bad)
        for candidate in self._same_identity(index):
            try:
                return candidate, load(candidate)
            except DataError as error:
                last = str(error)
                bad.append(self.source.path(candidate))
        raise DataError(
            f"none of the {len(bad) - failed} training images of the identity of {self.source.path(index)} can be "
            f"read, up to {last}. Is the storage still mounted? Take the identity out of the set, or list what is "
            f"damaged with: personvit data check data.root={os.path.dirname(bad[-1])}"
        )

    def order(
        self, key: MiniBatch, image_sizes: np.ndarray, used: list[int], bad: list[str]
    ) -> DaliOrder[FinetuneBatch]:
        """Whole images, resized and mirrored by DALI."""
        parameters = self._parameters(key)
        sizes = np.tile(np.array(self._input.size, dtype=np.float32), (self.size, 1, 1))
        sizes[:, 0, 1] *= np.where(parameters.flip, -1, 1)
        corners = np.concatenate([np.zeros_like(image_sizes), image_sizes], axis=1)
        return DaliOrder(
            boxes=corners[:, None].astype(np.float32),
            sizes=sizes,
            finish=lambda views, spread: self._finished(views[0], parameters, spread, used, bad),
        )

    def _finished(
        self, images: Tensor, parameters: InputParameters, spread: Spread, used: list[int], bad: list[str]
    ) -> FinetuneBatch:
        out = torch.empty(images.shape, device=self._device)
        piece = _PIECE if self._device.type == "cpu" else self.size
        parts = [slice(start, start + piece) for start in range(0, self.size, piece)]
        spread(self._finish, [(images[part], parameters.rows(part), out[part]) for part in parts])
        return self._collate(out, used, bad)

    def _parameters(self, key: MiniBatch) -> InputParameters:
        return draw_inputs(self._input, self.size, stream_seed(self._seed, key.epoch), key.first)

    def _collate(self, images: Tensor, used: list[int], bad: list[str]) -> FinetuneBatch:
        return FinetuneBatch(
            images=images,
            pids=torch.from_numpy(self._pids[used]),
            camids=torch.from_numpy(self._camids[used]),
            positions=torch.tensor(used, dtype=torch.int64),
            bad=bad,
        )

    def _same_identity(self, index: int) -> Iterator[int]:
        """The image itself, then the others of its identity, in the order of the set, round and round once."""
        yield index
        members = np.flatnonzero(self._pids == self._pids[index])
        place = int(np.searchsorted(members, index))
        yield from np.roll(members, -place)[1:].tolist()
