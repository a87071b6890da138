"""From the bytes of an image file to pixels, and what is refused on the way."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from personvit.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
"""File name endings that count as images, in any case."""

MAX_WIDTH = 4096
"""Pixels. Wider pictures hold no single person; decoding one may take gigabytes."""
MAX_PIXELS = 1 << 26
"""Pixels in all (64 Mi), for pictures that are merely tall."""

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # no format whose decoder starts another program
_MAGIC = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG\r\n\x1a\n", ".png"), (b"BM", ".bmp"))


def read_image(path: str) -> Image.Image:
    """`decode_image` of a file.

    Raises:
        DataError: the file is missing, damaged, cut short, too large, or not an image.
    """
    try:
        return decode_image(Path(path).read_bytes(), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image file wholly, as RGB of 8 bits. Orientation tags and alpha are ignored, as in the published code.

    Raises:
        DataError: damaged, cut short, too large, or not an image; the message begins with `name`.
    """
    with opened_image(data, name) as image:
        return to_rgb(image)


@contextmanager
def opened_image(data: bytes, name: str) -> Iterator[Image.Image]:
    """An image with its header read and no pixel decoded yet; use it within the block.

    Raises:
        DataError: wider than `MAX_WIDTH`, more than `MAX_PIXELS`, not an image, or whatever the decoder raises within
            the block; the message begins with `name`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width > MAX_WIDTH or width * height > MAX_PIXELS:
                raise DataError(
                    f"{name}: {width} x {height} pixels are refused (at most {MAX_WIDTH} wide and {MAX_PIXELS >> 20} "
                    f"Mi pixels in all): not a crop of one person. Cut the persons out first."
                )
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        reason = "not of a known format" if data else "empty file"
        raise DataError(f"{name}: cannot be read as an image ({reason})") from None
    # Decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error, IndexError, zlib.error ...
    except Exception as error:
        raise DataError(f"{name}: cannot be read as an image ({type(error).__name__}: {error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits. Greyscale of 16 bits keeps its upper 8: Pillow itself would clip it to white."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        upper = np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def ending_of(data: bytes) -> str | None:
    """The file name ending that fits the first bytes of a file; None: not of a format that counts as an image."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((ending for magic, ending in _MAGIC if data.startswith(magic)), None)
