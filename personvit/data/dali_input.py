"""Which image files DALI gets as they are, and what it gets in place of the others."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from personvit.data.decode import MAX_PIXELS, MAX_WIDTH, decode_image
from personvit.data.sources import ImageSource

_START_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman-coded


@dataclass(frozen=True)
class Encoded:
    """An image on its way to the pipeline.

    Attributes:
        data: [bytes] uint8, a JPEG or BMP file.
        size: height, width in pixels.
    """

    data: np.ndarray
    size: tuple[int, int]


def encode(source: ImageSource, index: int, by_pillow: bool) -> Encoded:
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
    return Encoded(np.frombuffer(data, dtype=np.uint8), size)


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
