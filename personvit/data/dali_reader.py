"""Batches made with DALI: read ahead in threads, decoded, cut and resized in a pipeline, finished in whole batches.

What a batch holds, and what becomes of the views, is the business of a `DaliPlan`.

DALI fails a whole batch when it cannot decode one image, and is of no use afterwards. So that this is rare, only plain
and complete JPEG files are given to it as they are; everything else is decoded by Pillow and handed over as BMP. If a
batch fails all the same, Pillow decodes every image of it (whatever it cannot read is named and replaced), the
pipeline is built anew, and the batch and those behind it are repeated.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from personvit.config.shared import DataConfig
from personvit.data.dali_input import Encoded, encode
from personvit.data.sources import ImageSource
from personvit.data.torch_reader import MAX_WORKERS, available_cores, close_at_exit
from personvit.errors import DataError

logger = logging.getLogger(__name__)

_PIECE = 8  # images that a reading thread takes at a time


class DaliBatch(Protocol):
    """A dataclass of tensors and other things."""

    def pin_memory(self) -> Any:
        """The batch in page-locked memory; what lies on a device already stays there."""


Key = TypeVar("Key")
KeyIn = TypeVar("KeyIn", contravariant=True)
Batch = TypeVar("Batch", bound=DaliBatch)
Loaded = TypeVar("Loaded")

Spread = Callable[[Callable[..., None], Iterable[tuple[Any, ...]]], None]
"""Call a function with each of some arguments, side by side where the views lie on a CPU."""


@dataclass(frozen=True)
class DaliOrder(Generic[Batch]):
    """What is to be made of the images of a batch.

    Attributes:
        boxes: [B, V, 4] float32 for the pipeline: top, left, bottom, right of each view, pixels of the image.
        sizes: [B, V, 2] float32: height and width of the view; a negative width mirrors it.
        finish: makes the batch of the views, V times [B, 3, H, W] uint8 (of which nothing may be kept).
    """

    boxes: np.ndarray
    sizes: np.ndarray
    finish: Callable[[list[Tensor], Spread], Batch]


class DaliPlan(Protocol[KeyIn, Batch]):
    """What the batches hold.

    Attributes:
        source: images. Its `read` is called from several threads.
        size: B, images of a batch.
        views: V, views of an image.
    """

    source: ImageSource
    size: int
    views: int

    def images(self, key: KeyIn) -> list[int]:
        """[B] numbers of the images of a batch within the source."""

    def readable(self, index: int, load: Callable[[int], Loaded], bad: list[str]) -> tuple[int, Loaded]:
        """`load` of an image or of the one that stands in for it, and its number; unreadable paths go to `bad`."""

    def order(self, key: KeyIn, image_sizes: np.ndarray, used: list[int], bad: list[str]) -> DaliOrder[Batch]:
        """What to make of the images `used`, of [B, 2] heights and widths, in place of those that are `bad`."""


def read_with_dali(
    plan: DaliPlan[Key, Batch], keys: Iterable[Key], data: DataConfig, device: torch.device
) -> Generator[Batch, None, None]:
    """The batches of a plan for every key in order, `data.prefetch` made ahead in a thread of their own.

    Args:
        plan: what the batches hold.
        keys: of the batches; taken as they are needed, so they may be endless.
        data: threads, prefetching, decoder.
        device: where views are made and batches lie: the CPU, or a CUDA device.

    Raises:
        PersonViTError: whatever the plan raises of this kind.
        DataError: DALI fails on images that Pillow could decode.
    """
    # At exit, what was registered last comes first: DALI ends its pipelines, which must be out of use by then.
    importlib.import_module("personvit.data.dali_graph")
    batches = _received(plan, keys, data, device)
    close_at_exit(batches)
    return batches


def _received(
    plan: DaliPlan[Key, Batch], keys: Iterable[Key], data: DataConfig, device: torch.device
) -> Generator[Batch, None, None]:
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(data.prefetch)
    stop = threading.Event()
    maker = threading.Thread(
        target=_make, args=(plan, keys, data, device, ready, stop), name="personvit-dali", daemon=True
    )
    maker.start()
    try:
        while True:
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            _use_on_this_stream(item)
            yield item
    finally:
        stop.set()
        maker.join()


def _make(
    plan: DaliPlan[Key, Batch],
    keys: Iterable[Key],
    data: DataConfig,
    device: torch.device,
    ready: queue.Queue[Batch | BaseException | None],
    stop: threading.Event,
) -> None:
    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    try:
        with ThreadPoolExecutor(
            thread_count(data.threads), initializer=_work_alone, initargs=(torch.get_num_threads(),)
        ) as pool:
            for batch in _Maker(plan, keys, data, device, pool).batches():
                put(batch)
                if stop.is_set():
                    return
        put(None)
    except BaseException as error:  # whatever it is, it belongs to the one who waits for the batch
        put(error)


@dataclass(frozen=True)
class _Prepared(Generic[Key, Batch]):
    """A batch on its way to the pipeline."""

    key: Key
    images: list[Encoded]
    order: DaliOrder[Batch]
    by_pillow: bool


class _Maker(Generic[Key, Batch]):
    """Makes the batches of one iteration. The threads of `pool` read, and on a CPU they finish the views."""

    def __init__(
        self,
        plan: DaliPlan[Key, Batch],
        keys: Iterable[Key],
        data: DataConfig,
        device: torch.device,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._plan, self._data, self._device, self._pool = plan, data, device, pool
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._to_read = iter(keys)
        self._reading: deque[tuple[Key, list[Future[list[tuple[int, Encoded, list[str]]]]]]] = deque()
        self._again: deque[_Prepared[Key, Batch]] = deque()  # to be repeated after a failure
        self._in_pipeline: deque[_Prepared[Key, Batch]] = deque()
        self._pipeline: Any = None

    def batches(self) -> Iterator[Batch]:
        """Every batch in its turn."""
        try:
            while (outputs := self._outputs()) is not None:
                yield self._finish(self._in_pipeline.popleft(), outputs)
        finally:
            self._pipeline = None

    def _outputs(self) -> Any:
        """What the pipeline makes of the next batch; None after the last one."""
        while True:
            if self._pipeline is None:
                self._pipeline = self._build()
            try:
                return self._pipeline.run()
            except StopIteration:
                return None
            except Exception as error:
                # It must be gone now. The traceback would keep it until some garbage collection, and if that takes
                # place in a forked process, it waits there for threads that do not exist.
                traceback.clear_frames(error.__traceback__)
                self._pipeline = None
                if not isinstance(error, RuntimeError):
                    raise
                self._recover(error)

    def _build(self) -> Any:
        from personvit.data.dali_graph import build_pipeline

        gpu = self._device.type == "cuda"
        return build_pipeline(
            self._feed,
            self._plan.views,
            batch_size=self._plan.size,
            threads=thread_count(self._data.threads),
            device_id=(self._device.index or 0) if gpu else None,
            decode=("mixed" if gpu else "cpu") if self._data.decode == "auto" else self._data.decode,
            hw_decoder_load=self._data.hw_decoder_load,
            depth=2,
        )

    def _feed(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """The next batch for the pipeline (see `build_pipeline`)."""
        prepared = self._again.popleft() if self._again else self._next_prepared()
        self._in_pipeline.append(prepared)
        return [image.data for image in prepared.images], prepared.order.boxes, prepared.order.sizes

    def _next_prepared(self) -> _Prepared[Key, Batch]:
        while len(self._reading) <= self._data.prefetch:
            try:
                key = next(self._to_read)
            except StopIteration:
                break
            wanted = self._plan.images(key)
            pieces = [wanted[start : start + _PIECE] for start in range(0, len(wanted), _PIECE)]
            self._reading.append((key, [self._pool.submit(self._read, piece, False) for piece in pieces]))
        if not self._reading:
            raise StopIteration
        key, futures = self._reading.popleft()
        return self._prepare(key, [image for future in futures for image in future.result()], by_pillow=False)

    def _read(self, wanted: list[int], by_pillow: bool) -> list[tuple[int, Encoded, list[str]]]:
        """For each image: the one that is used, its content, and the unreadable ones before it."""
        found = []
        for index in wanted:
            bad: list[str] = []
            used, encoded = self._plan.readable(index, lambda i: encode(self._plan.source, i, by_pillow), bad)
            found.append((used, encoded, bad))
        return found

    def _prepare(
        self, key: Key, images: list[tuple[int, Encoded, list[str]]], by_pillow: bool
    ) -> _Prepared[Key, Batch]:
        order = self._plan.order(
            key,
            np.array([encoded.size for _, encoded, _ in images]),
            [used for used, _, _ in images],
            [path for _, _, bad in images for path in bad],
        )
        return _Prepared(key, [encoded for _, encoded, _ in images], order, by_pillow)

    def _recover(self, error: RuntimeError) -> None:
        """Line up the batches that were in the pipeline again, the one that failed decoded by Pillow."""
        waiting = list(self._in_pipeline)
        self._in_pipeline.clear()
        # The first is the one that failed. If it has been through Pillow, the fault is in one behind it.
        failed = next((place for place, prepared in enumerate(waiting) if not prepared.by_pillow), None)
        if failed is None:
            raise DataError(
                f"DALI failed on images that Pillow had decoded for it: {error}. Is there enough memory? Try a "
                f"smaller data.prefetch, or data.loader=torchvision."
            ) from error
        key = waiting[failed].key
        logger.warning("DALI could not decode batch %s; Pillow decodes it (%s)", key, _first_line(error))
        waiting[failed] = self._prepare(key, self._read(self._plan.images(key), True), by_pillow=True)
        self._again.extendleft(reversed(waiting))

    def _finish(self, prepared: _Prepared[Key, Batch], outputs: Any) -> Batch:
        views = [_as_torch(output) for output in outputs]
        with torch.cuda.stream(self._stream):
            batch = prepared.order.finish(views, self._spread)
        if self._stream is not None:
            self._stream.synchronize()  # DALI writes its next batch where the views are
        pinned: Batch = batch.pin_memory() if torch.cuda.is_available() else batch
        return pinned

    def _spread(self, function: Callable[..., None], work: Iterable[tuple[Any, ...]]) -> None:
        if self._device.type == "cpu":
            deque(self._pool.map(lambda arguments: function(*arguments), work), maxlen=0)
        else:
            for arguments in work:
                function(*arguments)


def thread_count(wanted: int) -> int:
    """Decoding threads: as asked, or the cores that this process may use, at most `MAX_WORKERS`."""
    return wanted if wanted >= 1 else min(MAX_WORKERS, available_cores())


def _work_alone(cores: int) -> None:
    """Keep torch's operators in this thread from waking `cores` more: the threads of the pool work side by side.

    torch takes the setting also as that of threads in which it has not been at work yet, such as those of autograd: a
    thread of its own sets it back, once this one has taken it up.
    """
    torch.set_num_threads(1)
    torch.get_num_threads()
    restore = threading.Thread(target=torch.set_num_threads, args=(cores,))
    restore.start()
    restore.join()


def _as_torch(output: Any) -> Tensor:
    """[B, 3, H, W] uint8 of one output of the pipeline, in place."""
    tensor: Tensor = from_dlpack(output.as_tensor())
    return tensor


def _use_on_this_stream(batch: Any) -> None:
    """Its memory was taken on another stream: tell the allocator that this one reads it too."""
    for entry in dataclasses.fields(batch):
        value = getattr(batch, entry.name)
        if isinstance(value, Tensor) and value.is_cuda:
            value.record_stream(torch.cuda.current_stream(value.device))


def _first_line(error: RuntimeError) -> str:
    return next((line for line in str(error).splitlines() if "rror" in line), str(error))[:200]
