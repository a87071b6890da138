"""The DALI pipeline: decode an image once, cut, resize and mirror all its views. One definition for CPU and GPU.

Importing this module needs DALI. Colour, blur and the rest follow in `personvit.data.photometry`: on a CPU, DALI's own
colour and blur operators take longer than decoding and resizing together.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# Imported by name, as Any: what its stubs export does not cover what its documentation does.
_dali: Any = importlib.import_module("nvidia.dali")
fn, types = _dali.fn, _dali.types


def build_pipeline(
    feed: Callable[[], tuple[Any, Any, Any]],
    views: int,
    *,
    batch_size: int,
    threads: int,
    device_id: int | None,
    decode: str,
    hw_decoder_load: float,
    depth: int,
) -> Any:
    """A pipeline whose outputs are V batches of views, each [B, 3, H, W] uint8, on the GPU if there is a `device_id`.

    Args:
        feed: gives the next batch, or raises StopIteration: B encoded images ([bytes] uint8 arrays), boxes
            [B, V, 4] float32 (top, left, bottom, right, pixels), sizes [B, V, 2] float32 (height, width of the view;
            a negative width mirrors it).
        views: V.
        batch_size: B.
        threads: worker threads.
        device_id: CUDA device, or None: everything on the CPU.
        decode: cpu or mixed (nvJPEG).
        hw_decoder_load: share of the images for the hardware JPEG decoder, where there is one.
        depth: batches in the making at the same time.
    """
    pipeline = _dali.pipeline_def(_views)(
        feed,
        views,
        decode,
        hw_decoder_load,
        device_id is not None,
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=depth,
    )
    pipeline.build()
    return pipeline


def _views(
    feed: Callable[[], tuple[Any, Any, Any]], views: int, decode: str, hw_decoder_load: float, gpu: bool
) -> tuple[Any, ...]:
    encoded, boxes, sizes = fn.external_source(
        source=feed, num_outputs=3, dtype=[types.UINT8, types.FLOAT, types.FLOAT], ndim=[1, 2, 2]
    )
    image = fn.decoders.image(
        encoded,
        device=decode,
        output_type=types.RGB,
        adjust_orientation=False,  # orientation tags are ignored, as in `decode_image`
        jpeg_fancy_upsampling=True,  # what Pillow does
        hw_decoder_load=hw_decoder_load,
    )
    if gpu and decode == "cpu":
        image = image.gpu()
    outputs: list[Any] = []
    for view in range(views):
        # A box as the operator's own region of interest is no substitute: its filter reads beyond the edges.
        start, end = (fn.cast(boxes[view, side : side + 2], dtype=types.INT32) for side in (0, 2))
        cut = fn.slice(image, start=start, end=end, axes=(0, 1))
        resized = fn.resize(cut, size=sizes[view], interp_type=types.INTERP_CUBIC, antialias=True)
        outputs.append(fn.transpose(resized, perm=[2, 0, 1]))
    return tuple(outputs)
