"""The loader that needs nothing but torch: Pillow and torchvision in the processes of a DataLoader."""

from __future__ import annotations

import atexit
import os
import signal
import weakref
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from personvit.data.batches import BatchPlan, CropBatch, first_readable
from personvit.data.crops import MultiCrop
from personvit.data.sources import ImageSource
from personvit.errors import DataError, PersonViTError

MAX_WORKERS = 16

READER_GRACE_S = 60
"""Seconds that a reader process works on after SIGTERM."""


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
        self._micro_batches = plan.micro_batches(start_step)
        data = plan.cfg.data
        num_workers = reader_count(data.num_workers)
        self._loader: DataLoader[CropBatch | PersonViTError] = DataLoader(
            _MicroBatches(plan, source),
            batch_size=None,  # an item is a whole micro-batch already
            sampler=self._micro_batches,
            num_workers=num_workers,
            prefetch_factor=data.prefetch if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_outlive_signals if num_workers else None,
            # Its own generator: the DataLoader would otherwise draw a seed (unused here) from the global one, and a
            # resumed run, which opens its loader at another moment, would drift from the uninterrupted one.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[CropBatch]:
        batches = self._checked(iter(self._loader))
        # multiprocessing would wait at the end of the program for readers that have no orders.
        close_at_exit(batches)
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


class _MicroBatches(Dataset["CropBatch | PersonViTError"]):
    """Item i = micro-batch i of this rank in this epoch, or the error that prevented it.

    Errors travel as values: raised in a worker they would reach the user as a traceback wrapped in a traceback.
    """

    def __init__(self, plan: BatchPlan, source: ImageSource) -> None:
        self._plan, self._source = plan, source
        self._crops = MultiCrop(plan.cfg.crops)

    def __getitem__(self, micro: int) -> CropBatch | PersonViTError:
        try:
            return self._assemble(micro)
        except PersonViTError as error:
            return error

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


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reader_count(wanted: int) -> int:
    """Reader processes: as asked, or the cores that this process may use, at most `MAX_WORKERS`, less one."""
    return wanted if wanted >= 0 else min(MAX_WORKERS, available_cores()) - 1


def close_at_exit(batches: Generator[CropBatch, None, None]) -> None:
    """Close what a program leaves open at its end, before the interpreter takes down what it works with."""
    atexit.register(_close, weakref.ref(batches))


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
