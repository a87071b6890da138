"""What is random about the views of an image, drawn for whole batches at once.

Every loader cuts, mirrors and colours views with these numbers. They depend on the seed, the number of the image and
the size of the image alone: not on the batch that the image travels in, and not on who applies them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np

from personvit.config import CropsConfig
from personvit.data.masks import uniform_rows
from personvit.runtime.seed import stream_seed

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_ORDERS = np.array(list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))), dtype=np.int64)  # [24, 4]

_TRIES = 10
_BOX = 2 * _TRIES + 2  # draws of a box: area and aspect of each try, and the place
_DRAWS = _BOX + 11


@dataclass(frozen=True)
class ViewParameters:
    """Everything random about V views of B images. Every array is [B, V], `order` is [B, V, 4].

    Attributes:
        top, left, height, width: int64, box to cut, pixels of the image.
        flip: bool, mirror left to right.
        jitter: bool; where it is False the four factors are neutral.
        brightness, contrast, saturation: float64, factors, 1 = unchanged.
        hue: float64, shift in turns, 0 = unchanged.
        order: int64, the order of the four: 0 brightness, 1 contrast, 2 saturation, 3 hue.
        grey: bool, three equal channels.
        sigma: float64, standard deviation of the blur in pixels of the view, 0 = none.
        solarize: bool, invert what is 128 or more.
    """

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip: np.ndarray
    jitter: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray
    order: np.ndarray
    grey: np.ndarray
    sigma: np.ndarray
    solarize: np.ndarray

    def __len__(self) -> int:
        return len(self.top)

    def rows(self, part: slice) -> ViewParameters:
        """All views of some of the images."""
        return ViewParameters(*(getattr(self, entry.name)[part] for entry in dataclasses.fields(self)))

    def views(self, part: slice) -> ViewParameters:
        """Some of the views of every image."""
        return ViewParameters(*(getattr(self, entry.name)[:, part] for entry in dataclasses.fields(self)))


def draw_views(cfg: CropsConfig, sizes: np.ndarray, seed: int, first: int = 0) -> ViewParameters:
    """Draw the views of images first ... first + B - 1 of a stream: 2 global ones, then `cfg.local_crops` local ones.

    Image i depends on (seed, first + i) and on its size alone; so does view v, whatever the number of views.

    Args:
        cfg: scales, probabilities, ranges.
        sizes: [B, 2] integers, height and width of each image in pixels.
        seed: 63-bit stream seed.
        first: number of the first image within the stream.
    """
    count = 2 + cfg.local_crops
    u = np.stack([uniform_rows(len(sizes), _DRAWS, stream_seed(seed, v), first) for v in range(count)], axis=1)
    kind = np.minimum(np.arange(count), 2)  # global 1, global 2, local
    scale = np.array([cfg.global_scale, cfg.global_scale, cfg.local_scale])[kind]
    boxes = crop_boxes(sizes, scale, cfg.aspect_ratio, u[..., :_BOX])
    flip, chosen, place, grey, blurred, solarized, *factors, sigma = np.moveaxis(u[..., _BOX:], -1, 0)
    jitter = chosen < cfg.jitter_probability
    brightness, contrast, saturation = (
        np.where(jitter, _between(max(0.0, 1 - strength), 1 + strength, draw), 1.0)
        for strength, draw in zip(cfg.jitter[:3], factors, strict=False)
    )
    return ViewParameters(
        top=boxes[..., 0],
        left=boxes[..., 1],
        height=boxes[..., 2],
        width=boxes[..., 3],
        flip=flip < cfg.flip,
        jitter=jitter,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=np.where(jitter, _between(-cfg.jitter[3], cfg.jitter[3], factors[3]), 0.0),
        order=_ORDERS[(place * len(_ORDERS)).astype(np.int64)],
        grey=grey < cfg.grayscale,
        sigma=np.where(blurred < np.array(cfg.blur)[kind], _between(*cfg.blur_sigma, sigma), 0.0),
        solarize=solarized < np.array(cfg.solarize)[kind],
    )


def crop_boxes(sizes: np.ndarray, scale: np.ndarray, ratio: tuple[float, float], u: np.ndarray) -> np.ndarray:
    """Boxes of random resized crops (the rule of torchvision's RandomResizedCrop).

    Ten times: area = height * width * U(scale), aspect = exp(U(ln ratio)); the first that fits is taken, at a uniform
    place. If none does: the largest centred box whose aspect is clamped to `ratio`.

    Args:
        sizes: [B, 2] integers, height and width of each image in pixels.
        scale: [V, 2] range of the area fraction of each view.
        ratio: range of width / height of a box.
        u: [B, V, 22] uniform in [0, 1).

    Returns:
        [B, V, 4] int64: top, left, height, width in pixels.
    """
    height, width = (sizes[:, i, None].astype(np.int64) for i in range(2))  # [B, 1]
    draws = u[..., : 2 * _TRIES].reshape(*u.shape[:2], _TRIES, 2)
    share = scale[:, None, 0] + (scale[:, None, 1] - scale[:, None, 0]) * draws[..., 0]  # [B, V, tries]
    area = (height * width)[..., None] * share
    aspect = np.exp(_between(math.log(ratio[0]), math.log(ratio[1]), draws[..., 1]))
    tall, wide = (np.rint(np.sqrt(x)).astype(np.int64) for x in (area / aspect, area * aspect))
    fits = (tall > 0) & (tall <= height[..., None]) & (wide > 0) & (wide <= width[..., None])
    chosen = fits.argmax(-1)[..., None]
    tall, wide = (np.take_along_axis(x, chosen, -1)[..., 0] for x in (tall, wide))
    whole_tall, whole_wide = _centred(height, width, ratio)
    found = fits.any(-1)
    tall, wide = np.where(found, tall, whole_tall), np.where(found, wide, whole_wide)
    room_down, room_right = height - tall, width - wide
    top = np.where(found, (u[..., -2] * (room_down + 1)).astype(np.int64), room_down // 2)
    left = np.where(found, (u[..., -1] * (room_right + 1)).astype(np.int64), room_right // 2)
    return np.stack([top, left, tall, wide], axis=-1)


def _centred(height: np.ndarray, width: np.ndarray, ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of the largest box of an aspect within `ratio`."""
    aspect = width / height
    tall = np.where(aspect < ratio[0], np.maximum(1, np.rint(width / ratio[0])), height)
    wide = np.where(aspect > ratio[1], np.maximum(1, np.rint(height * ratio[1])), width)
    return tall.astype(np.int64), wide.astype(np.int64)


def _between(low: float, high: float, draws: np.ndarray) -> np.ndarray:
    """Uniform draws in [0, 1) moved to [low, high)."""
    return low + (high - low) * draws
