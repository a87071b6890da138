"""One picture: a person in front of a place, what stands before the person, and what the camera makes of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from personvit.data.generated import occluders
from personvit.data.generated.body import View, build
from personvit.data.generated.camera import Camera, expose, make_camera
from personvit.data.generated.config import Stream, random_stream
from personvit.data.generated.garments import Wardrobe, make_wardrobe
from personvit.data.generated.identity import Identity, make_identity
from personvit.data.generated.pose import make_pose
from personvit.data.generated.render import Canvas, Floats, Light, Tube
from personvit.data.generated.scene import make_scene, window


@dataclass(frozen=True, slots=True)
class Shot:
    """What to draw: which person, by which camera, with which dice."""

    pid: int
    camera: int
    serial: int
    """Number of the picture within the set; with the seed it fixes everything that varies."""
    heading: float | None = None
    """Yaw of the track that the picture belongs to; None: drawn."""
    occluded: bool = False
    misplaced: bool = False
    """The box missed the person, as junk boxes of a detector do."""


@lru_cache(maxsize=400)
def _person(seed: int, pid: int) -> tuple[Identity, Wardrobe]:
    person = make_identity(seed, pid)
    return person, make_wardrobe(seed, person)


@lru_cache(maxsize=64)
def _camera(seed: int, number: int) -> Camera:
    return make_camera(seed, number)


def render_crop(seed: int, shot: Shot) -> Image.Image:
    """Draw a shot. The result depends on its arguments only."""
    rng = random_stream(seed, Stream.CROP, shot.serial)
    camera = _camera(seed, shot.camera)
    heading = shot.heading if shot.heading is not None else track_heading(rng, camera)
    view = View(
        yaw=heading + float(rng.normal(0, 0.16)),
        pitch=max(0.0, camera.pitch + float(rng.normal(0, 0.05))),
        distance=float(rng.uniform(3.0, 7.0)),
    )
    person, wardrobe = _person(seed, shot.pid)
    tubes = build(person, wardrobe, make_pose(rng, person), view)
    native = float(rng.uniform(*camera.height))
    width, height, scale, left, top = _frame(rng, tubes, native, shot.misplaced)
    tubes = [tube.moved(scale, left, top) for tube in tubes]

    scene = make_scene(seed, shot.camera, int(rng.integers(0, camera.zones)), camera.pitch)
    picture = np.array(window(scene, rng, (width, height)))
    if rng.random() < 0.12:
        _passer_by(rng, seed, camera, view, picture, behind=True)
    _floor_shadow(picture, tubes, camera)
    canvas = Canvas(height, width)
    for tube in tubes:
        canvas.draw(tube)
    canvas.shade(picture, _jittered(camera.light, rng), _folds(rng, height, width))
    if shot.occluded:
        if rng.random() < 0.35:
            _passer_by(rng, seed, camera, view, picture, behind=False)
        else:
            occluders.add(picture, rng)
    small = Image.fromarray(picture).resize(
        (max(24, round(width * native / height)), round(native)), Image.Resampling.BOX, reducing_gap=None
    )
    return expose(small, camera, rng, seed)


def encode_crop(seed: int, shot: Shot) -> bytes:
    """Draw a shot and compress it as JPEG with the camera's quality."""
    camera = _camera(seed, shot.camera)
    buffer = io.BytesIO()
    quality = int(np.clip(camera.quality + (shot.serial * 7919) % 9 - 4, 30, 95))
    render_crop(seed, shot).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def track_heading(rng: np.random.Generator, camera: Camera) -> float:
    """The yaw of one walk past a camera: along its main direction, against it, or any other way."""
    draw = rng.random()
    if draw < 0.32:
        return camera.heading
    if draw < 0.64:
        return camera.heading + np.pi
    return float(rng.uniform(-np.pi, np.pi))


def _extent(tubes: list[Tube]) -> tuple[float, float, float, float]:
    left = min(min(t.start[0], t.end[0]) - 0.8 * float(t.profile.max()) for t in tubes)
    right = max(max(t.start[0], t.end[0]) + 0.8 * float(t.profile.max()) for t in tubes)
    top = min(min(t.start[1], t.end[1]) for t in tubes)
    bottom = max(max(t.start[1], t.end[1]) for t in tubes)
    return left, top, right, bottom


def _frame(
    rng: np.random.Generator, tubes: list[Tube], native: float, misplaced: bool
) -> tuple[int, int, float, float, float]:
    """Canvas width and height, and scale and shift of the person: a detector's box with its errors."""
    left, top, right, bottom = _extent(tubes)
    tall, wide = bottom - top, right - left
    margin = rng.uniform(0.0, 0.09, 4)
    if rng.random() < 0.12:
        margin[3] = -rng.uniform(0.05, 0.3)
    if rng.random() < 0.05:
        margin[2] = -rng.uniform(0.02, 0.1)
    if misplaced:
        margin[2], margin[3] = rng.uniform(-0.75, 0.6), rng.uniform(0.2, 0.5)
        margin[0] = rng.uniform(-0.6, 0.4)
    box_height = tall * max(0.3, 1 + margin[2] + margin[3])
    ratio = float(np.clip(wide * (1 + 2 * (margin[0] + margin[1])) / box_height, 0.33, 0.56))
    height = int(np.clip(native * 1.3, 150, 288))
    width = round(height * ratio)
    scale = height / box_height
    shift = (rng.random() - 0.5) * 0.06 * width + (margin[0] * width if misplaced else 0.0)
    x = 0.5 * width - 0.5 * (left + right) * scale + shift
    y = (tall * margin[2] - top) * scale
    return width, height, scale, float(x), float(y)


def _passer_by(
    rng: np.random.Generator, seed: int, camera: Camera, view: View, picture: NDArray[np.uint8], *, behind: bool
) -> None:
    """Somebody else, partly in the picture. Taken from identities that no split uses."""
    height, width = picture.shape[:2]
    person, wardrobe = _person(seed, 90_000_000 + int(rng.integers(0, 400)))
    other = View(yaw=float(rng.uniform(-np.pi, np.pi)), pitch=view.pitch, distance=view.distance)
    tubes = build(person, wardrobe, make_pose(rng, person), other)
    _, top, _, bottom = _extent(tubes)
    scale = height / (bottom - top) * float(rng.uniform(0.55, 0.8) if behind else rng.uniform(0.95, 1.25))
    side = 1 if rng.random() < 0.5 else -1
    x = width * (0.5 + side * float(rng.uniform(0.3, 0.55)))
    y = height * float(rng.uniform(0.0, 0.25)) - top * scale
    canvas = Canvas(height, width)
    for tube in tubes:
        canvas.draw(tube.moved(scale, x, y))
    canvas.shade(picture, camera.light, _folds(rng, height, width))


def _jittered(light: Light, rng: np.random.Generator) -> Light:
    factor = rng.uniform(0.9, 1.1, 2)
    return Light(light.direction, light.ambient * float(factor[0]), light.diffuse * float(factor[1]))


@lru_cache(maxsize=1)
def _fold_bank() -> tuple[Floats, Floats]:
    """Slopes of a crumpled cloth, [640, 448] each. The same for every set: only the cut differs."""
    rng = random_stream(0, Stream.NOISE, 1)
    height = np.zeros((640, 448), np.float32)
    for cell, amount in ((36, 1.0), (16, 0.5), (7, 0.22)):
        coarse = rng.standard_normal((640 // cell + 2, 448 // (cell // 2) + 2), dtype=np.float32)
        height += amount * np.asarray(Image.fromarray(coarse).resize((448, 640), Image.Resampling.BICUBIC))
    slope_y, slope_x = np.gradient(height)
    return (slope_x * 1.5).astype(np.float32), (slope_y * 1.5).astype(np.float32)


def _folds(rng: np.random.Generator, height: int, width: int) -> tuple[Floats, Floats]:
    slope_x, slope_y = _fold_bank()
    y, x = int(rng.integers(0, 640 - height)), int(rng.integers(0, 448 - width))
    return slope_x[y : y + height, x : x + width], slope_y[y : y + height, x : x + width]


def _floor_shadow(picture: NDArray[np.uint8], tubes: list[Tube], camera: Camera) -> None:
    """A soft dark patch under the feet, stretched away from the light."""
    height, width = picture.shape[:2]
    feet = max(max(tube.start[1], tube.end[1]) for tube in tubes)
    middle = sum(tube.start[0] for tube in tubes) / len(tubes)
    lx, _, lz = camera.light.direction
    y0, y1 = max(0, int(feet - height * 0.16)), min(height, int(feet + height * 0.06))
    if y0 >= y1:
        return
    ys = (np.arange(y0, y1, dtype=np.float32)[:, None] - np.float32(feet - 0.01 * height - 0.02 * height * lz)) / (
        0.045 * height
    )
    xs = (np.arange(width, dtype=np.float32)[None, :] - np.float32(middle - 0.12 * height * lx)) / (
        (0.12 + 0.08 * abs(lx)) * height
    )
    dark = 1 - np.float32(camera.shadow) * np.exp(-(xs * xs + ys * ys))
    picture[y0:y1] = (picture[y0:y1] * dark[..., None]).astype(np.uint8)
