"""The training batches of fine-tuning, epoch by epoch, from torchvision's readers or from DALI."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import lru_cache

import torch

from personvit.config.finetune import FinetuneConfig
from personvit.data.dali_reader import read_with_dali
from personvit.data.finetune_batches import ORDER, FinetuneBatch, FinetunePlan, MiniBatch
from personvit.data.identity_sampler import IdentitySampler
from personvit.data.loaders import choose_loader
from personvit.data.reid_sets import ReIDSplit
from personvit.data.torch_reader import read_with_processes
from personvit.runtime.seed import stream_seed

__all__ = ["FinetuneBatch", "FinetuneLoader", "FinetuneReader", "build_finetune_loader"]


class FinetuneLoader:
    """The batches of one rank for one epoch, in order. Iterating again starts over.

    Attributes:
        steps: steps of the whole epoch; the draw of the identities decides how many.
    """

    def __init__(self, steps: int, start_step: int, read: Callable[[], Iterator[FinetuneBatch]]) -> None:
        self.steps = steps
        self._start_step, self._read = start_step, read

    def __len__(self) -> int:
        return max(0, self.steps - self._start_step)

    def __iter__(self) -> Iterator[FinetuneBatch]:
        return self._read()


class FinetuneReader:
    """The training batches of a run.

    Reader processes and threads are started once and go on from one epoch to the next, so that an epoch of a few steps
    does not begin by waiting for them.

    Args:
        cfg: configuration; `train.batch_size` is global.
        train: training set, identities labelled 0 ... n-1.
        rank: of this process.
        world_size: number of ranks.
        epochs: nothing is read ahead from this epoch on; None: `train.epochs`.

    Raises:
        BackendUnavailableError: the loader asked for cannot run here.
    """

    def __init__(
        self, cfg: FinetuneConfig, train: ReIDSplit, rank: int, world_size: int, epochs: int | None = None
    ) -> None:
        self._data = cfg.data
        self._epochs = cfg.train.epochs if epochs is None else epochs
        self._rank, self._world_size = rank, world_size
        self._loader = choose_loader(cfg.data.loader)
        cuda = self._loader == "dali-gpu"
        self._device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self._plan = FinetunePlan(cfg, train, world_size, self._device)
        sampler = IdentitySampler(
            train.pids, cfg.train.batch_size, cfg.train.instances, stream_seed(cfg.train.seed, ORDER)
        )
        # The reader is an epoch ahead of the training at most.
        self._drawn = lru_cache(maxsize=2)(lambda epoch: sampler.batches(epoch, rank, world_size))
        self._stream: Generator[FinetuneBatch, None, None] | None = None
        self._next: tuple[int, int] | None = None  # epoch and step that the stream gives next

    def epoch(self, epoch: int, start_step: int = 0) -> FinetuneLoader:
        """The batches of an epoch, from a step on (resuming).

        Raises:
            ConfigError: the batch does not divide into P x K for every rank.
            DataError: too few identities for one step; while iterating: an identity without a readable image, or a
                reader process died.
        """
        return FinetuneLoader(len(self._drawn(epoch)), start_step, lambda: self._read(epoch, start_step))

    def close(self) -> None:
        """End the reader processes and threads; they are started anew when they are needed again."""
        stream, self._stream, self._next = self._stream, None, None
        if stream is not None:
            stream.close()

    def _read(self, epoch: int, start_step: int) -> Iterator[FinetuneBatch]:
        steps = len(self._drawn(epoch))
        for step in range(start_step, steps):
            batch = self._take(epoch, step)
            last = step + 1 == steps
            self._next = (epoch + 1, 0) if last else (epoch, step + 1)
            if last and epoch + 1 >= self._epochs:
                self.close()
            try:
                yield batch
            except GeneratorExit:
                if not last:  # the epoch is given up
                    self.close()
                raise

    def _take(self, epoch: int, step: int) -> FinetuneBatch:
        """The batch of a step: the next one, if the stream has come that far, else the first of a new stream."""
        if self._stream is None or self._next != (epoch, step):
            self.close()
            self._stream = self._open(epoch, step)
        try:
            return next(self._stream)
        except BaseException:
            self.close()  # a stream that has failed gives nothing more
            raise

    def _open(self, epoch: int, step: int) -> Generator[FinetuneBatch, None, None]:
        keys = self._keys(epoch, step)
        if self._loader == "torchvision":
            return read_with_processes(self._plan.assemble, keys, self._data)
        return read_with_dali(self._plan, keys, self._data, self._device)

    def _keys(self, epoch: int, start_step: int) -> Iterator[MiniBatch]:
        """From a step of an epoch to the end of the last epoch."""
        for current in range(epoch, max(epoch + 1, self._epochs)):
            for step, images in enumerate(self._drawn(current)):
                if current > epoch or step >= start_step:
                    first = (step * self._world_size + self._rank) * self._plan.size
                    yield MiniBatch(current, step, first, images)


def build_finetune_loader(
    cfg: FinetuneConfig, train: ReIDSplit, rank: int, world_size: int, epoch: int, start_step: int = 0
) -> FinetuneLoader:
    """The batches of a single epoch; a run of several takes a `FinetuneReader`.

    Args:
        cfg: configuration; `train.batch_size` is global.
        train: training set, identities labelled 0 ... n-1.
        rank: of this process.
        world_size: number of ranks.
        epoch: from 0; every epoch has its own order, crops and boxes.
        start_step: first step to give (resuming).

    Raises:
        BackendUnavailableError: the loader asked for cannot run here.
        ConfigError: the batch does not divide into P x K for every rank.
        DataError: too few identities for one step; while iterating: an identity without a readable image, or a reader
            process died.
    """
    return FinetuneReader(cfg, train, rank, world_size, epochs=epoch + 1).epoch(epoch, start_step)
