"""Batches made by the processes of a DataLoader. What a batch holds is the caller's business."""

from __future__ import annotations

import atexit
import os
import signal
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from personvit.config.shared import DataConfig
from personvit.errors import DataError, PersonViTError

MAX_WORKERS = 16

READER_GRACE_S = 60
"""Seconds that a reader process works on after SIGTERM."""

Key = TypeVar("Key")
Batch = TypeVar("Batch")


def read_with_processes(
    assemble: Callable[[Key], Batch], keys: Iterable[Key], data: DataConfig
) -> Generator[Batch, None, None]:
    """`assemble(key)` for every key in order, made ahead in `data.num_workers` processes (0: in this one).

    Args:
        assemble: makes a batch; called in the reader processes.
        keys: what `assemble` needs to know of each batch; taken as they are needed, so they may be endless.
        data: number of processes, and batches that each of them keeps ready.

    Raises:
        PersonViTError: whatever `assemble` raises of this kind.
        DataError: a reader process died.
    """
    num_workers = reader_count(data.num_workers)
    loader: DataLoader[Batch | PersonViTError] = DataLoader(
        _Assembled(assemble),
        batch_size=None,  # an item is a whole batch already
        sampler=keys,
        num_workers=num_workers,
        prefetch_factor=data.prefetch if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_outlive_signals if num_workers else None,
        # Its own generator: the DataLoader would otherwise draw a seed (unused here) from the global one, and a
        # resumed run, which opens its loader at another moment, would drift from the uninterrupted one.
        generator=torch.Generator(),
    )
    batches = _checked(iter(loader))
    # multiprocessing would wait at the end of the program for readers that have no orders.
    close_at_exit(batches)
    return batches


def _checked(items: Iterator[Batch | PersonViTError]) -> Generator[Batch, None, None]:
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


class _Assembled(Dataset["Batch | PersonViTError"], Generic[Key, Batch]):
    """Item `key` = the batch of that key, or the error that prevented it.

    Errors travel as values: raised in a worker they would reach the user as a traceback wrapped in a traceback.
    """

    def __init__(self, assemble: Callable[[Key], Batch]) -> None:
        self._assemble = assemble

    def __getitem__(self, key: Key) -> Batch | PersonViTError:
        try:
            return self._assemble(key)
        except PersonViTError as error:
            return error


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reader_count(wanted: int) -> int:
    """Reader processes: as asked, or the cores that this process may use, at most `MAX_WORKERS`, less one."""
    return wanted if wanted >= 0 else min(MAX_WORKERS, available_cores()) - 1


def close_at_exit(batches: Generator[Any, None, None]) -> None:
    """Close what a program leaves open at its end, before the interpreter takes down what it works with."""
    atexit.register(_close, weakref.ref(batches))


def _outlive_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group, but only the main process may answer them.

    It still needs its readers for the step it is in. They end when it closes the loader or is gone; the alarm ends
    them if it does neither.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(READER_GRACE_S))


def _close(batches: weakref.ref[Generator[Any, None, None]]) -> None:
    generator = batches()
    if generator is not None:
        generator.close()
