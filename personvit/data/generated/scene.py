"""Places: a muted wall and floor with things standing about, from which each crop cuts another window."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from personvit.data.generated.config import Stream, random_stream
from personvit.data.generated.identity import Colour

WIDTH, HEIGHT = 400, 420


@dataclass(frozen=True, slots=True)
class Scene:
    """A place as one camera sees it."""

    picture: Image.Image
    """WIDTH x HEIGHT, RGB."""
    horizon: float
    """Row where the floor meets the wall."""


@lru_cache(maxsize=16)
def make_scene(seed: int, camera: int, zone: int, pitch: float) -> Scene:
    """One of a camera's places (kept for the next crops of the same camera)."""
    return _paint(random_stream(seed, Stream.SCENE, camera, zone), pitch)


def window(scene: Scene, rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A cut of the place for a person who stands somewhere on its floor.

    Args:
        scene: the place.
        rng: source of the position.
        size: width and height of the result.
    """
    width, height = size
    feet = float(rng.uniform(max(scene.horizon + 25, HEIGHT * 0.4), HEIGHT))
    # The nearer a person stands, the larger the window that the body fills.
    tall = min(feet, HEIGHT * (0.34 + 0.5 * feet / HEIGHT) * float(rng.uniform(0.85, 1.15)))
    wide = min(tall * width / height, WIDTH - 1.0)
    left = float(rng.uniform(0, WIDTH - wide))
    box = (left, feet - tall, left + wide, feet)
    return scene.picture.resize(size, Image.Resampling.BILINEAR, box=box)


def muted(rng: np.random.Generator, low: float = 70, high: float = 205, strength: float = 0.16) -> Colour:
    """A greyish colour."""
    value = rng.uniform(low, high)
    tint = np.clip(rng.normal(0, strength * 0.3, 3), -0.12, 0.12)
    red, green, blue = (int(level) for level in np.clip(value * (1 + tint - tint.mean()), 5, 250))
    return red, green, blue


def _paint(rng: np.random.Generator, pitch: float) -> Scene:
    horizon = float(np.clip(HEIGHT * (0.42 - 0.85 * pitch + rng.normal(0, 0.06)), -40, HEIGHT * 0.5))
    wall, floor = muted(rng), muted(rng)
    picture = Image.new("RGB", (WIDTH, HEIGHT), floor)
    draw = ImageDraw.Draw(picture)
    _floor(draw, rng, horizon, floor)
    if horizon > 0:
        draw.rectangle((0, 0, WIDTH, horizon), fill=wall)
        _wall(draw, rng, horizon, wall)
    for _ in range(int(rng.integers(2, 9))):
        _thing(draw, rng, horizon)
    picture = picture.filter(ImageFilter.BoxBlur(float(rng.uniform(0.9, 3.6))))
    return Scene(_weathered(picture, rng), horizon)


def _near(rng: np.random.Generator, colour: Colour, amount: float) -> Colour:
    step = rng.normal(0, amount)
    red, green, blue = (int(np.clip(level + step, 5, 250)) for level in colour)
    return red, green, blue


def _floor(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: float, floor: Colour) -> None:
    kind = rng.random()
    line = _near(rng, floor, 22)
    vanish = (float(rng.uniform(0, WIDTH)), horizon - float(rng.uniform(20, 260)))
    if kind < 0.6:
        for x in range(-1200, 1600, int(rng.integers(50, 170))):
            draw.line((vanish[0], vanish[1], x, HEIGHT), fill=line, width=int(rng.integers(1, 3)))
        depth, y = 1.0, float(HEIGHT)
        while y > horizon + 6 and depth < 30:
            draw.line((0, y, WIDTH, y + rng.normal(0, 2)), fill=line, width=1)
            depth *= 1.22
            y = horizon - 60 + (HEIGHT - horizon + 60) / depth
    if kind > 0.45:
        for _ in range(int(rng.integers(1, 4))):
            y = float(rng.uniform(max(horizon, 0), HEIGHT))
            tall = float(rng.uniform(6, 70))
            slant = float(rng.normal(0, 40))
            shape = [(0, y), (WIDTH, y + slant), (WIDTH, y + slant + tall), (0, y + tall)]
            draw.polygon(shape, fill=_near(rng, floor, 18))


def _wall(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: float, wall: Colour) -> None:
    step = int(rng.integers(24, 110))
    kind = rng.random()
    for x in range(int(rng.integers(-40, 0)), WIDTH, step):
        if kind < 0.4:
            draw.line((x, 0, x, horizon), fill=_near(rng, wall, 20), width=2)
        elif kind < 0.75:
            top = float(rng.uniform(0, horizon * 0.5))
            bottom = top + float(rng.uniform(0.2, 0.7)) * (horizon - top)
            draw.rectangle((x + step * 0.15, top, x + step * 0.8, bottom), fill=_near(rng, wall, 34))
        else:
            draw.rectangle((x, 0, x + step, horizon), fill=_near(rng, wall, 14))
    if rng.random() < 0.5:
        draw.rectangle((0, horizon - 14, WIDTH, horizon), fill=_near(rng, wall, 30))


def _thing(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: float) -> None:
    """A door, car, pole, bush, box, sign, or another person far off."""
    base = float(rng.uniform(max(horizon, 10), HEIGHT * 0.85))
    size = 0.35 + 0.65 * base / HEIGHT
    x = float(rng.uniform(-20, WIDTH))
    colour = muted(rng, 40, 215, 0.32)
    kind = int(rng.integers(0, 6))
    if kind == 0:
        draw.rectangle((x, base - 190 * size, x + 70 * size, base), fill=colour)
        draw.rectangle((x + 8, base - 170 * size, x + 62 * size, base - 90 * size), fill=_near(rng, colour, 25))
    elif kind == 1:
        wide, tall = 210 * size, 62 * size
        draw.rounded_rectangle((x, base - tall, x + wide, base - 8), radius=int(18 * size) + 1, fill=colour)
        draw.rounded_rectangle(
            (x + wide * 0.2, base - tall * 1.6, x + wide * 0.8, base - tall * 0.8),
            radius=8,
            fill=_near(rng, (70, 76, 82), 14),
        )
        for wheel in (0.22, 0.78):
            cx = x + wide * wheel
            draw.ellipse((cx - 17 * size, base - 26 * size, cx + 17 * size, base + 6 * size), fill=(34, 34, 36))
    elif kind == 2:
        draw.rectangle((x, base - 330 * size, x + float(rng.uniform(5, 16)) * size, base), fill=colour)
    elif kind == 3:
        green = _near(rng, (78, 92, 66), 18)
        for _ in range(14):
            cx, cy = x + rng.normal(0, 34) * size, base - abs(rng.normal(30, 28)) * size
            radius = float(rng.uniform(8, 24)) * size
            draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=_near(rng, green, 12))
    elif kind == 4:
        wide, tall = float(rng.uniform(30, 120)) * size, float(rng.uniform(25, 100)) * size
        draw.rectangle((x, base - tall, x + wide, base), fill=colour)
        draw.rectangle((x, base - tall, x + wide, base - tall * 0.75), fill=_near(rng, colour, 30))
    else:
        tall = 150 * size * float(rng.uniform(0.8, 1.1))
        wide = tall * 0.2
        draw.rectangle((x + wide * 0.15, base - tall * 0.5, x + wide * 0.85, base), fill=muted(rng, 25, 120))
        draw.rounded_rectangle((x, base - tall * 0.86, x + wide, base - tall * 0.45), radius=4, fill=colour)
        draw.ellipse((x + wide * 0.28, base - tall, x + wide * 0.72, base - tall * 0.86), fill=(150, 118, 98))


def _weathered(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Uneven light and grain."""
    coarse = rng.normal(0, 1, (7, 6)).astype(np.float32)
    soft = np.asarray(Image.fromarray(coarse).resize(picture.size, Image.Resampling.BICUBIC))
    grain = rng.standard_normal((HEIGHT // 3, WIDTH // 3), dtype=np.float32)
    fine = np.asarray(Image.fromarray(grain).resize(picture.size, Image.Resampling.BILINEAR))
    factor = 1 + np.float32(rng.uniform(0.04, 0.13)) * soft + np.float32(rng.uniform(0.01, 0.06)) * fine
    return Image.fromarray(np.minimum(np.asarray(picture) * factor[..., None], 255).astype(np.uint8))
