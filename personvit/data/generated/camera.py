"""Cameras: where they hang, what light falls there, and what the sensor and the encoder do to a picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from personvit.data.generated.config import POOL_CAMERA_FIRST, Stream, random_stream
from personvit.data.generated.render import Light


@dataclass(frozen=True, slots=True)
class Camera:
    """What stays the same in all pictures of one camera."""

    number: int
    zones: int
    """Places that it sees."""
    pitch: float
    heading: float
    """The direction most people walk, as the yaw that the camera sees."""
    height: tuple[float, float]
    """Native height of its crops in pixels: range."""
    light: Light
    gains: tuple[float, float, float]
    gamma: float
    contrast: float
    lift: float
    saturation: float
    blur: float
    """Standard deviation in native pixels."""
    noise: float
    quality: int
    shadow: float
    """Darkness of the shadow on the floor."""


def make_camera(seed: int, number: int) -> Camera:
    """Draw camera `number` of a set.

    The cameras of the labelled split (below POOL_CAMERA_FIRST) differ less from each other than the pool's and see more
    places each: else light and background would tell more about a picture than the person does.
    """
    rng = random_stream(seed, Stream.CAMERA, number)
    labelled = number < POOL_CAMERA_FIRST
    spread = 0.6 if labelled else 1.0
    azimuth, elevation = rng.uniform(-np.pi, np.pi), rng.uniform(0.5, 1.2)
    sunny = rng.random() < 0.35
    warm, green = spread * rng.normal(0, 0.05), spread * rng.normal(0, 0.015)
    tall = float(rng.uniform(128, 232))
    towards = 1 if rng.random() < 0.75 else -0.6
    return Camera(
        number=number,
        zones=6 if labelled else 1,
        pitch=float(np.clip(rng.gamma(3.0, 0.085), 0.02, 0.62)),
        heading=float(rng.uniform(-np.pi, np.pi)),
        height=(tall * 0.78, min(256.0, tall * 1.22)),
        light=Light(
            direction=(
                float(np.cos(elevation) * np.sin(azimuth)),
                float(-np.sin(elevation)),
                float(abs(np.cos(elevation) * np.cos(azimuth)) * towards),
            ),
            ambient=float(rng.uniform(0.48, 0.6) if sunny else rng.uniform(0.66, 0.82)),
            diffuse=float(rng.uniform(0.5, 0.7) if sunny else rng.uniform(0.18, 0.38)),
        ),
        gains=(float(1 + warm), float(1 + green), float(1 - warm)),
        gamma=float(np.exp(np.clip(spread * rng.normal(0.0, 0.15), -0.35, 0.35))),
        contrast=float(np.clip(1 + spread * rng.normal(-0.02, 0.12), 0.72, 1.25)),
        lift=float(np.clip(spread * rng.normal(4, 9), -12, 24)),
        saturation=float(np.clip(0.94 + spread * rng.normal(0, 0.13), 0.55, 1.2)),
        blur=float(min(rng.gamma(2.0, 0.19), 0.9)),
        noise=float(min(rng.gamma(2.0, 1.3), 8.0)),
        quality=int(rng.integers(42, 93)),
        shadow=float(rng.uniform(0.35, 0.6) if sunny else rng.uniform(0.12, 0.3)),
    )


_NOISE: dict[int, Image.Image] = {}


def _noise_bank(seed: int) -> Image.Image:
    """One tile of unit noise around 128 (32 levels per standard deviation), of which each picture takes a cut."""
    if seed not in _NOISE:
        _NOISE.clear()
        values = random_stream(seed, Stream.NOISE).standard_normal((512, 512, 3), dtype=np.float32)
        # Sensor noise is mostly common to the colours and a little coarser than one pixel after demosaicing.
        values = 0.6 * values[..., :1] + 0.8 * values
        _NOISE[seed] = Image.fromarray(np.clip(128 + 32 * values, 0, 255).astype(np.uint8))
    return _NOISE[seed]


def expose(picture: Image.Image, camera: Camera, rng: np.random.Generator, seed: int) -> Image.Image:
    """Blur, noise, white balance, exposure and colour of a camera, with the small changes from frame to frame."""
    blur = camera.blur + float(rng.gamma(1.2, 0.14))
    if rng.random() < 0.08:
        blur += float(rng.uniform(0.4, 1.0))
    if blur > 0.3:
        # A box of radius r has the deviation r / sqrt(3) and costs a third of Pillow's Gaussian.
        picture = picture.filter(ImageFilter.BoxBlur(1.73 * blur))
    saturation = camera.saturation * float(rng.uniform(0.93, 1.07))
    matrix = _luma_mix(saturation)
    pixels = np.asarray(picture).astype(np.float32).reshape(-1, 3) @ matrix
    width, height = picture.size
    x, y = int(rng.integers(0, 512 - width)), int(rng.integers(0, 512 - height))
    grain = np.asarray(_noise_bank(seed).crop((x, y, x + width, y + height)))
    noise = camera.noise * float(rng.uniform(0.8, 1.2))
    pixels += (grain.astype(np.float32).reshape(-1, 3) - 128) * np.float32(noise / 32)
    np.maximum(pixels, 0, out=pixels)
    np.minimum(pixels, 255, out=pixels)
    return Image.fromarray(pixels.astype(np.uint8).reshape(height, width, 3)).point(_curve(camera, rng))


def _luma_mix(saturation: float) -> NDArray[np.float32]:
    """Matrix [3, 3] that moves colours (rows) towards their luma; ITU-R BT.601 weights."""
    luma = np.array([0.299, 0.587, 0.114], np.float32)[:, None]
    matrix: NDArray[np.float32] = (
        np.float32(saturation) * np.eye(3, dtype=np.float32) + np.float32(1 - saturation) * luma
    )
    return matrix


def _curve(camera: Camera, rng: np.random.Generator) -> list[int]:
    """Look-up table of 3 x 256 entries."""
    exposure = float(rng.normal(1.0, 0.06)) * (1 + rng.normal(0, 0.012, 3)) * np.array(camera.gains)
    x = np.multiply.outer(exposure, np.arange(256) / 255.0)  # [3, 256]
    value = 255 * ((np.power(x, camera.gamma) - 0.45) * camera.contrast + 0.45) + camera.lift
    table: list[int] = np.minimum(np.maximum(value, 0), 255).astype(np.int64).ravel().tolist()
    return table
