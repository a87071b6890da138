"""The loader on DALI: reads ahead in threads, decodes and cuts in a pipeline, colours whole batches.

DALI fails a whole batch when it cannot decode one image, and is of no use afterwards. So that this is rare, only plain
and complete JPEG files are given to it as they are; everything else is decoded by Pillow and handed over as BMP. If a
batch fails all the same, Pillow decodes every image of it (whatever it cannot read is named and replaced), the
pipeline is built anew, and the batch and those behind it are repeated.
"""

from __future__ import annotations

import io
import logging
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from personvit.data.batches import BatchPlan, CropBatch, first_readable
from personvit.data.decode import MAX_PIXELS, MAX_WIDTH, decode_image
from personvit.data.loader_torch import MAX_WORKERS, available_cores, close_at_exit
from personvit.data.photometry import Photometry
from personvit.data.sources import ImageSource
from personvit.data.views import ViewParameters, draw_views
from personvit.errors import DataError

logger = logging.getLogger(__name__)

_PIECE = 8  # images that a reading thread takes at a time
_START_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman-coded


@dataclass(frozen=True)
class _Encoded:
    """An image on its way to the pipeline."""

    data: np.ndarray  # [bytes] uint8
    size: tuple[int, int]  # height, width


@dataclass(frozen=True)
class _Prepared:
    """A micro-batch on its way to the pipeline."""

    micro: int
    images: list[_Encoded]
    used: list[int]
    bad: list[str]
    parameters: ViewParameters
    by_pillow: bool


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
        self._threads = thread_count(plan.cfg.data.threads)

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[CropBatch]:
        batches = self._received()
        close_at_exit(batches)
        return batches

    def _received(self) -> Generator[CropBatch, None, None]:
        """Batches as a thread of their own makes them, `data.prefetch` ahead."""
        ready: queue.Queue[CropBatch | BaseException | None] = queue.Queue(self._plan.cfg.data.prefetch)
        stop = threading.Event()
        maker = threading.Thread(target=self._make, args=(ready, stop), name="personvit-dali", daemon=True)
        maker.start()
        try:
            while True:
                item = ready.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                if item.global_crops.is_cuda:
                    _use_on_this_stream(item)
                yield item
        finally:
            stop.set()
            maker.join()

    def _make(self, ready: queue.Queue[CropBatch | BaseException | None], stop: threading.Event) -> None:
        def put(item: CropBatch | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        try:
            cores = torch.get_num_threads()
            with ThreadPoolExecutor(self._threads, initializer=_work_alone, initargs=(cores,)) as pool:
                maker = _Maker(self._plan, self._source, self._device, self._threads, self._micro_batches, pool)
                for batch in maker.batches():
                    put(batch)
                    if stop.is_set():
                        return
            put(None)
        except BaseException as error:  # whatever it is, it belongs to the one who waits for the batch
            put(error)


class _Maker:
    """Makes the batches of one iteration. The threads of `pool` read, and on a CPU they colour the views."""

    def __init__(
        self,
        plan: BatchPlan,
        source: ImageSource,
        device: torch.device,
        threads: int,
        micro_batches: range,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._plan, self._source, self._device, self._threads = plan, source, device, threads
        self._pool = pool
        self._photometry = Photometry(plan.cfg.crops, device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._to_read = iter(micro_batches)
        self._reading: deque[tuple[int, list[Future[list[tuple[int, _Encoded, list[str]]]]]]] = deque()
        self._again: deque[_Prepared] = deque()  # to be repeated after a failure
        self._in_pipeline: deque[_Prepared] = deque()

    def batches(self) -> Iterator[CropBatch]:
        """Every micro-batch in its turn."""
        pipeline = self._build()
        while True:
            try:
                outputs = pipeline.run()
            except StopIteration:
                return
            except RuntimeError as error:
                del pipeline
                self._recover(error)
                pipeline = self._build()
                continue
            yield self._finish(self._in_pipeline.popleft(), outputs)

    def _build(self) -> Any:
        from personvit.data.dali_graph import build_pipeline

        data = self._plan.cfg.data
        gpu = self._device.type == "cuda"
        return build_pipeline(
            self._feed,
            2 + self._plan.cfg.crops.local_crops,
            batch_size=self._plan.size,
            threads=self._threads,
            device_id=(self._device.index or 0) if gpu else None,
            decode=("mixed" if gpu else "cpu") if data.decode == "auto" else data.decode,
            hw_decoder_load=data.hw_decoder_load,
            depth=2,
        )

    def _feed(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """The next batch for the pipeline (see `build_pipeline`)."""
        prepared = self._again.popleft() if self._again else self._next_prepared()
        self._in_pipeline.append(prepared)
        p, crops = prepared.parameters, self._plan.cfg.crops
        boxes = np.stack([p.top, p.left, p.top + p.height, p.left + p.width], axis=-1).astype(np.float32)
        sizes = np.empty((*p.top.shape, 2), dtype=np.float32)
        sizes[:, :2], sizes[:, 2:] = crops.global_size, crops.local_size
        sizes[..., 1] *= np.where(p.flip, -1, 1)
        return [image.data for image in prepared.images], boxes, sizes

    def _next_prepared(self) -> _Prepared:
        while len(self._reading) <= self._plan.cfg.data.prefetch:
            micro = next(self._to_read, None)
            if micro is None:
                break
            wanted = self._plan.images(micro)
            pieces = [wanted[start : start + _PIECE] for start in range(0, len(wanted), _PIECE)]
            self._reading.append((micro, [self._pool.submit(self._read, piece, False) for piece in pieces]))
        if not self._reading:
            raise StopIteration
        micro, futures = self._reading.popleft()
        return self._prepare(micro, [image for future in futures for image in future.result()], by_pillow=False)

    def _read(self, wanted: list[int], by_pillow: bool) -> list[tuple[int, _Encoded, list[str]]]:
        """For each image: the one that is used, its content, and the unreadable ones before it."""
        found = []
        for index in wanted:
            bad: list[str] = []
            used, encoded = first_readable(self._source, index, lambda i: encode(self._source, i, by_pillow), bad)
            found.append((used, encoded, bad))
        return found

    def _prepare(self, micro: int, images: list[tuple[int, _Encoded, list[str]]], by_pillow: bool) -> _Prepared:
        sizes = np.array([encoded.size for _, encoded, _ in images])
        return _Prepared(
            micro=micro,
            images=[encoded for _, encoded, _ in images],
            used=[used for used, _, _ in images],
            bad=[path for _, _, bad in images for path in bad],
            parameters=draw_views(self._plan.cfg.crops, sizes, self._plan.crops_seed, self._plan.first_position(micro)),
            by_pillow=by_pillow,
        )

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
        micro = waiting[failed].micro
        logger.warning("DALI could not decode micro-batch %d; Pillow decodes it (%s)", micro, _first_line(error))
        waiting[failed] = self._prepare(micro, self._read(self._plan.images(micro), True), by_pillow=True)
        self._again.extendleft(reversed(waiting))

    def _finish(self, prepared: _Prepared, outputs: Any) -> CropBatch:
        views = [_as_torch(output) for output in outputs]
        with torch.cuda.stream(self._stream):
            global_crops = self._colour(views[:2], prepared.parameters.views(slice(0, 2)))
            local_crops = self._colour(views[2:], prepared.parameters.views(slice(2, None))) if len(views) > 2 else None
        if self._stream is not None:
            self._stream.synchronize()  # DALI writes its next batch where the views are
        batch = self._plan.collate(prepared.micro, global_crops, local_crops, prepared.used, prepared.bad)
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def _colour(self, views: list[Tensor], parameters: ViewParameters) -> Tensor:
        """Finish views of one size, each [B, 3, H, W] uint8, and put them one after the other."""
        size = self._plan.size
        out = torch.empty(len(views) * size, *views[0].shape[1:], device=self._device)
        work = [
            (view, parameters.views(slice(number, number + 1)), out[number * size : (number + 1) * size])
            for number, view in enumerate(views)
        ]
        if self._device.type == "cpu":
            deque(self._pool.map(lambda arguments: self._photometry(*arguments), work), maxlen=0)
        else:
            for arguments in work:
                self._photometry(*arguments)
        return out


def encode(source: ImageSource, index: int, by_pillow: bool) -> _Encoded:
    """An image as DALI can decode it: as it is stored if it is a plain and complete JPEG, else as BMP from Pillow.

    Raises:
        DataError: it cannot be read, or, as far as Pillow looked at it, decoded.
    """
    data = source.read(index)
    size = None if by_pillow else plain_jpeg_size(data)
    if size is None:
        image = decode_image(data, source.path(index))
        buffer = io.BytesIO()
        image.save(buffer, format="BMP")
        data, size = buffer.getvalue(), (image.height, image.width)
    return _Encoded(np.frombuffer(data, dtype=np.uint8), size)


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG of 8-bit grey or YCbCr that is there to its end marker; None for everything else.

    Only the header is read. Left to Pillow: CMYK, RGB, 12 bits, arithmetic coding, files with something behind the
    end, sizes that are refused.
    """
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return None
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        segment = data[place + 4 : place + 2 + length]
        if marker == 0xEE and segment.startswith(b"Adobe") and segment[11:12] != b"\x01":
            return None  # not YCbCr
        if marker in _START_OF_FRAME:
            return _frame_size(segment)
        if not 0xC4 <= marker <= 0xFE or marker in range(0xC5, 0xD0) or length < 2:
            return None
        place += 2 + length
    return None


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """Height and width from a frame header, if it is of 8 bits and one component, or three that are YCbCr."""
    if len(frame) < 6 or frame[0] != 8:
        return None
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    components = frame[6::3]
    ycbcr = frame[5] == 3 and components == b"\x01\x02\x03"
    known = ycbcr or (frame[5] == 1 and len(components) == 1)
    return (height, width) if known and width <= MAX_WIDTH and 0 < height * width <= MAX_PIXELS else None


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


def _use_on_this_stream(batch: CropBatch) -> None:
    """Its memory was taken on another stream: tell the allocator that this one reads it too."""
    stream = torch.cuda.current_stream(batch.global_crops.device)
    for crops in (batch.global_crops, batch.local_crops):
        if crops is not None:
            crops.record_stream(stream)


def _first_line(error: RuntimeError) -> str:
    return next((line for line in str(error).splitlines() if "rror" in line), str(error))[:200]
