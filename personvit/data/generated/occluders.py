"""Things between the camera and the person: poles, cars, bushes, bags, walls, signs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from personvit.data.generated.scene import muted


def add(picture: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Draw one thing over the picture [H, W, 3], in place."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    height, width = picture.shape[:2]
    _THINGS[int(rng.integers(0, len(_THINGS)))](draw, rng, width, height)
    picture[:] = np.asarray(image)


def _pole(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    x, wide = float(rng.uniform(0.15, 0.8)) * width, float(rng.uniform(0.07, 0.2)) * width
    lean = float(rng.normal(0, 0.03)) * width
    colour = muted(rng, 50, 190)
    draw.polygon([(x, 0), (x + wide, 0), (x + wide + lean, height), (x + lean, height)], fill=colour)
    bright = tuple(min(255, value + 22) for value in colour)
    draw.polygon([(x, 0), (x + wide * 0.3, 0), (x + wide * 0.3 + lean, height), (x + lean, height)], fill=bright)


def _car(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    top = float(rng.uniform(0.52, 0.74)) * height
    colour = muted(rng, 40, 215, 0.3)
    draw.rounded_rectangle((-0.4 * width, top, 1.4 * width, 1.2 * height), radius=int(0.12 * width), fill=colour)
    dark = tuple(int(value * 0.6) for value in colour)
    draw.rectangle((0, top + 0.1 * height, width, top + 0.125 * height), fill=dark)
    cx = float(rng.uniform(-0.1, 1.1)) * width
    draw.ellipse((cx - 0.3 * width, 0.86 * height, cx + 0.3 * width, 0.86 * height + 0.6 * width), fill=(30, 30, 32))


def _bush(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    low = float(rng.uniform(0.6, 0.85)) * height
    for _ in range(46):
        x, y = float(rng.uniform(-0.1, 1.1)) * width, low + float(rng.exponential(0.12)) * height
        radius = float(rng.uniform(0.05, 0.16)) * width
        shade = float(rng.uniform(0.6, 1.2))
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=(int(70 * shade), int(88 * shade), int(56 * shade))
        )


def _box(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    x, wide = float(rng.uniform(-0.2, 0.7)) * width, float(rng.uniform(0.35, 0.8)) * width
    top = float(rng.uniform(0.55, 0.85)) * height
    colour = muted(rng, 50, 200, 0.3)
    draw.rectangle((x, top, x + wide, height), fill=colour)
    draw.rectangle((x, top, x + wide, top + 0.04 * height), fill=tuple(min(255, value + 25) for value in colour))


def _wall(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    share = float(rng.uniform(0.2, 0.42)) * width
    colour = muted(rng, 60, 200)
    box = (0, 0, share, height) if rng.random() < 0.5 else (width - share, 0, width, height)
    draw.rectangle(box, fill=colour)


def _rail(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    colour = muted(rng, 60, 200)
    top = float(rng.uniform(0.45, 0.7)) * height
    gap = max(6, int(float(rng.uniform(0.1, 0.22)) * width))
    draw.rectangle((0, top, width, top + 0.02 * height), fill=colour)
    for x in range(int(rng.integers(0, gap)), width, gap):
        draw.rectangle((x, top, x + max(1, 0.025 * width), height), fill=colour)


_THINGS = (_pole, _car, _bush, _box, _wall, _rail)
