"""Multi-crop augmentation: two global and several local views of one image."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from personvit.config import CropsConfig
from personvit.runtime.seed import stream_seed

_TRIES = 10
_SOLARIZE_THRESHOLD = 128


@dataclass(frozen=True)
class _View:
    """What distinguishes one kind of view from another."""

    size: tuple[int, int]
    scale: tuple[float, float]
    blur: float
    solarize: float


class MultiCrop:
    """Cut an image into augmented views, in the order [global 1, global 2, local 1 ... local n].

    The operations and their constants are those of DataAugmentationiBOT (bytedance/ibot main_ibot.py), which
    TransReID-SSL, PASS and SOLIDER share: random resized crop (bicubic) -> mirror -> colour jitter -> grey -> blur ->
    solarize -> [0, 1] -> normalise. All of them run on 8-bit PIL images.

    Every random number comes from the seed of the call: the same (image, seed) gives the same views in any process,
    and the global generators are neither read nor moved.

    Args:
        cfg: sizes, scales, probabilities.
    """

    def __init__(self, cfg: CropsConfig) -> None:
        self.cfg = cfg
        first, second, local = (
            _View(size, scale, blur, solarize)
            for size, scale, blur, solarize in zip(
                (cfg.global_size, cfg.global_size, cfg.local_size),
                (cfg.global_scale, cfg.global_scale, cfg.local_scale),
                cfg.blur,
                cfg.solarize,
                strict=True,
            )
        )
        self._views = [first, second] + [local] * cfg.local_crops
        self._mean = torch.tensor(cfg.mean).view(3, 1, 1)
        self._std = torch.tensor(cfg.std).view(3, 1, 1)

    def __call__(self, image: Image.Image, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """Make the views of an image.

        Args:
            image: RGB.
            seed: any integer; views take independent streams of it.

        Returns:
            Two global views [3, H, W] and the local views [3, h, w], float32, normalised.
        """
        views = [
            self._normalise(self._augment(image, view, random.Random(stream_seed(seed, number))))
            for number, view in enumerate(self._views)
        ]
        return views[:2], views[2:]

    def _augment(self, image: Image.Image, view: _View, rng: random.Random) -> Image.Image:
        cfg = self.cfg
        top, left, height, width = crop_box(image.height, image.width, view.scale, cfg.aspect_ratio, rng)
        image = F.resized_crop(
            image, top, left, height, width, list(view.size), interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        if rng.random() < cfg.flip:
            image = F.horizontal_flip(image)
        if rng.random() < cfg.jitter_probability:
            image = _jitter(image, cfg.jitter, rng)
        if rng.random() < cfg.grayscale:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if rng.random() <= view.blur:
            # Pillow's radius is the standard deviation, in pixels of the resized view.
            image = image.filter(ImageFilter.GaussianBlur(_uniform(rng, *cfg.blur_sigma)))
        if rng.random() < view.solarize:
            image = F.solarize(image, _SOLARIZE_THRESHOLD)
        return image

    def _normalise(self, image: Image.Image) -> Tensor:
        pixels: Tensor = F.pil_to_tensor(image).contiguous().float()  # [3, H, W]
        return pixels.div_(255).sub_(self._mean).div_(self._std)


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop (the rule of torchvision's RandomResizedCrop).

    Ten times: area = height * width * U(scale), aspect = exp(U(ln ratio)); taken if the box fits, at a uniform place.
    Failing that, the largest centred box whose aspect is clamped to `ratio`.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        scale: range of the area fraction.
        ratio: range of width / height of the box.
        rng: source of every draw.

    Returns:
        top, left, height, width of the box, pixels.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area = height * width * _uniform(rng, *scale)
        aspect = math.exp(_uniform(rng, low, high))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = _below(rng, height - box_height + 1)
            left = _below(rng, width - box_width + 1)
            return top, left, box_height, box_width
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        box_width = max(1, round(height * ratio[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _jitter(image: Image.Image, strength: tuple[float, float, float, float], rng: random.Random) -> Image.Image:
    """Brightness, contrast, saturation (factors U(1 - s, 1 + s)) and hue (U(-s, s) of a turn) in random order."""
    brightness, contrast, saturation = (_uniform(rng, max(0.0, 1 - s), 1 + s) for s in strength[:3])
    hue = _uniform(rng, -strength[3], strength[3])
    steps = [
        lambda picture: F.adjust_brightness(picture, brightness),
        lambda picture: F.adjust_contrast(picture, contrast),
        lambda picture: F.adjust_saturation(picture, saturation),
        lambda picture: F.adjust_hue(picture, hue),
    ]
    for _, step in sorted((rng.random(), number) for number in range(4)):
        image = steps[step](image)
    return image


def _uniform(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _below(rng: random.Random, count: int) -> int:
    """Integer in [0, count). From `random()` alone, whose values do not change between versions of Python."""
    return int(rng.random() * count)
