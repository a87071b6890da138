"""Cameras: where they hang, what light falls there, and what the sensor and the encoder do to a picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from personvit.data.generated.config import Stream, random_stream
from personvit.data.generated.render import Light


@dataclass(frozen=True, slots=True)
class Camera:
    """What stays the same in all pictures of one camera."""

    number: int
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
    """Draw camera `number` of a set."""
    rng = random_stream(seed, Stream.CAMERA, number)
    azimuth, elevation = rng.uniform(-np.pi, np.pi), rng.uniform(0.5, 1.2)
    sunny = rng.random() < 0.35
    warm = rng.normal(0, 0.055)
    green = rng.normal(0, 0.02)
    tall = float(rng.uniform(120, 236))
    return Camera(
        number=number,
        pitch=float(np.clip(rng.gamma(3.0, 0.085), 0.02, 0.62)),
        heading=float(rng.uniform(-np.pi, np.pi)),
        height=(tall * 0.78, min(256.0, tall * 1.22)),
        light=Light(
            direction=(
                float(np.cos(elevation) * np.sin(azimuth)),
                float(-np.sin(elevation)),
                float(abs(np.cos(elevation) * np.cos(azimuth)) * (1 if rng.random() < 0.75 else -0.6)),
            ),
            ambient=float(rng.uniform(0.46, 0.6) if sunny else rng.uniform(0.66, 0.84)),
            diffuse=float(rng.uniform(0.55, 0.75) if sunny else rng.uniform(0.15, 0.38)),
        ),
        gains=(float(1 + warm), float(1 + green), float(1 - warm)),
        gamma=float(np.clip(rng.normal(1.0, 0.16), 0.68, 1.45)),
        contrast=float(np.clip(rng.normal(0.98, 0.12), 0.7, 1.25)),
        lift=float(np.clip(rng.normal(4, 9), -12, 26)),
        saturation=float(np.clip(rng.normal(0.92, 0.14), 0.55, 1.2)),
        blur=float(rng.gamma(2.0, 0.22)),
        noise=float(min(rng.gamma(2.0, 1.8), 12.0)),
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
    blur = camera.blur + float(rng.gamma(1.2, 0.16))
    if rng.random() < 0.08:
        blur += float(rng.uniform(0.5, 1.3))
    if blur > 0.25:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    saturation = camera.saturation * float(rng.uniform(0.93, 1.07))
    pixels = np.asarray(picture).astype(np.float32)
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    pixels = grey[..., None] + (pixels - grey[..., None]) * np.float32(saturation)
    width, height = picture.size
    x, y = int(rng.integers(0, 512 - width)), int(rng.integers(0, 512 - height))
    grain = np.asarray(_noise_bank(seed).crop((x, y, x + width, y + height)))
    noise = camera.noise * float(rng.uniform(0.8, 1.2))
    pixels += (grain.astype(np.float32) - 128) * np.float32(noise / 32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).point(_curve(camera, rng))


def _curve(camera: Camera, rng: np.random.Generator) -> list[int]:
    """Look-up table of 3 x 256 entries."""
    exposure = float(rng.normal(1.0, 0.06))
    x = np.arange(256) / 255.0
    tables = []
    for gain in camera.gains:
        value = np.power(np.clip(x * gain * exposure, 0, None), camera.gamma)
        value = 255 * ((value - 0.45) * camera.contrast + 0.45) + camera.lift
        tables.append(np.clip(value, 0, 255).astype(int))
    return [int(value) for value in np.concatenate(tables)]
