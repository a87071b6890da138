"""What is odd about one image file, though it can be read."""

from __future__ import annotations

from enum import IntFlag
from pathlib import PurePath
from typing import NamedTuple

from PIL import Image

from personvit.data.decode import ending_of, opened_image, to_rgb

SMALLEST = 8
"""Pixels; a smaller picture shows nobody."""
ASPECTS = (0.1, 3.0)
"""Width / height of anything that may be a person, crouching or with a bicycle."""

_ORIENTATION_TAG = 0x0112
_PNG_DEPTH_AT = 24  # byte of the header that holds the bits of a channel
_JPEG_END, _PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"
_SAME = {".jpeg": ".jpg"}


class Oddity(IntFlag):
    """Reasons to look at a file. It is still used."""

    SMALL = 1
    ASPECT = 2
    CMYK = 4
    GREY = 8
    DEEP = 16
    PALETTE = 32
    ANIMATED = 64
    ROTATED = 128
    FLAT = 256
    TRAILING = 512
    NO_END = 1024
    ENDING = 2048


MEANINGS = {
    Oddity.SMALL: f"under {SMALLEST} pixels high or wide",
    Oddity.ASPECT: f"width / height outside {ASPECTS[0]:g} to {ASPECTS[1]:g}",
    Oddity.CMYK: "CMYK",
    Oddity.GREY: "greyscale",
    Oddity.DEEP: "16 bits a channel (8 are used)",
    Oddity.PALETTE: "palette of colours",
    Oddity.ANIMATED: "several frames (the first is used)",
    Oddity.ROTATED: "EXIF asks for a rotation (ignored)",
    Oddity.FLAT: "one flat colour",
    Oddity.TRAILING: "bytes after the end of the image",
    Oddity.NO_END: "no end mark (cut short?)",
    Oddity.ENDING: "content of another format than the name says",
}


class ImageFacts(NamedTuple):
    """One image file that can be read: pixels, and its oddities."""

    height: int
    width: int
    oddities: Oddity


def inspect_image(data: bytes, name: str) -> ImageFacts:
    """Decode an image file wholly, just as training does, and look for oddities.

    Args:
        data: content of the file.
        name: where it lies.

    Raises:
        DataError: it cannot be read (see `decode_image`).
    """
    with opened_image(data, name) as image:
        mode = image.mode
        width, height = image.size
        image.load()
        found = _shape_oddities(height, width) | _file_oddities(data, name)
        if mode in ("CMYK", "YCCK"):
            found |= Oddity.CMYK
        elif mode in ("L", "LA", "1", "I", "F") or mode.startswith("I;16"):
            found |= Oddity.GREY
        elif mode in ("P", "PA"):
            found |= Oddity.PALETTE
        if mode == "I" or mode.startswith("I;16") or (data[:4] == b"\x89PNG" and data[_PNG_DEPTH_AT] == 16):
            found |= Oddity.DEEP
        if getattr(image, "is_animated", False):
            found |= Oddity.ANIMATED
        if "exif" in image.info and image.getexif().get(_ORIENTATION_TAG, 1) not in (0, 1):
            found |= Oddity.ROTATED
        if _is_flat(image if mode == "RGB" else to_rgb(image)):
            found |= Oddity.FLAT
    return ImageFacts(height, width, found)


def _shape_oddities(height: int, width: int) -> Oddity:
    found = Oddity(0)
    if min(height, width) < SMALLEST:
        found |= Oddity.SMALL
    if not ASPECTS[0] <= width / height <= ASPECTS[1]:
        found |= Oddity.ASPECT
    return found


def _is_flat(rgb: Image.Image) -> bool:
    # A few pixels tell nearly every picture apart; only those that look flat are gone through wholly.
    right, bottom = rgb.width - 1, rgb.height - 1
    corner = rgb.getpixel((0, 0))
    if any(rgb.getpixel(at) != corner for at in ((right // 2, bottom // 2), (right, bottom), (right, 0))):
        return False
    return all(low == high for low, high in rgb.getextrema())  # type: ignore[misc]  # pairs: there are three bands


def _file_oddities(data: bytes, name: str) -> Oddity:
    found = Oddity(0)
    ending = ending_of(data)
    said = PurePath(name).suffix.lower()
    if said and ending is not None and ending != _SAME.get(said, said):
        found |= Oddity.ENDING
    mark = {".jpg": _JPEG_END, ".png": _PNG_END}.get(ending or "")
    if mark is not None and not data.endswith(mark):
        found |= Oddity.NO_END if data.rfind(mark) < 0 else Oddity.TRAILING
    elif ending == ".webp" and len(data) > int.from_bytes(data[4:8], "little") + 9:  # 8 of the header, 1 of padding
        found |= Oddity.TRAILING
    return found
