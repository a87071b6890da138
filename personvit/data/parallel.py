"""A function over many pieces of work in several processes, with results in order and little waiting in memory."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from personvit.errors import DataError

MAX_WORKERS = 64

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def worker_count(wanted: int) -> int:
    """Processes for work that leaves this one idle: as asked, or one for each core (at most `MAX_WORKERS`).

    Args:
        wanted: -1: choose. 0: no process but this one.
    """
    if wanted >= 0:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores)


def ordered_map(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    workers: int,
    initializer: Callable[..., None],
    initargs: tuple[Any, ...],
) -> Iterator[_Result]:
    """`map(function, items)` in worker processes. No more than a few pieces for each worker are ever under way.

    Args:
        function: of a module, so that other processes find it.
        items: pieces of work.
        workers: processes; 0 works in this one.
        initializer: called once in each process before its first piece.
        initargs: arguments of `initializer`; they reach the workers once, not with every piece.

    Raises:
        DataError: a worker died.
    """
    if workers == 0:
        initializer(*initargs)
        yield from map(function, items)
        return
    running: deque[Future[_Result]] = deque()
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(initializer, initargs)) as pool:
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > 3 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"a worker process died ({error}). Most often memory ran out; try fewer (data.num_workers=1), or 0 to "
                f"see which image is at fault."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*initargs)


def _end_with_parent() -> None:
    """A worker whose main process was killed would otherwise wait for orders for ever, holding what it inherited."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
