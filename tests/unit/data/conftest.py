"""Small image files for the data tests: noise, so that every pixel says which image it came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _write_image(path: Path, seed: int, size: tuple[int, int] = (24, 48)) -> Path:
    """Write noise of `size` (width, height); JPEG or PNG by the ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _truncate(path: Path) -> None:
    """Cut a file to half its length: the header is whole, the pixels are not."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.fixture
def make_images(tmp_path):
    """`make_images(n)` -> folder with 00000.jpg ... of noise."""

    def make(count: int, folder: str = "images") -> Path:
        for number in range(count):
            _write_image(tmp_path / folder / f"{number:05}.jpg", number)
        return tmp_path / folder

    return make


@pytest.fixture
def write_image():
    """`write_image(path, seed, size=(24, 48))` -> path."""
    return _write_image


@pytest.fixture
def truncate():
    """`truncate(path)` damages an image file."""
    return _truncate
