"""Training images of fine-tuning: resize -> mirror -> padded crop -> [0, 1] -> normalise -> erase.

The operations and constants are those of hustvl/PersonViT (datasets/make_dataloader.py) and of timm's RandomErasing in
mode pixel. What is random about an image depends on the seed and on its position in the epoch alone, so every loader,
with any number of workers, makes the same images up to its decoder and resizing filter.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personvit.config.finetune import InputConfig
from personvit.data.masks import uniform_rows
from personvit.runtime.seed import stream_seed

_TRIES = 10
_DRAWS = 6 + 2 * _TRIES  # mirror, crop (2), erase or not, its place (2); area and aspect of each try
_GEOMETRY, _NOISE = 0, 1  # separate random streams of one seed
_CHUNK = 1 << 18
"""Pixels that are normalised together on a CPU, so that they stay in the caches."""


@dataclass(frozen=True)
class InputParameters:
    """Everything random about B training images.

    Attributes:
        flip: [B] bool, mirror left to right.
        top, left: [B] int64, corner of the crop within the padded image, pixels.
        box: [B, 4] int64, top, left, height and width of what is erased, pixels; height 0: nothing.
        noise: [B] int64, seeds of the noise that takes its place.
    """

    flip: np.ndarray
    top: np.ndarray
    left: np.ndarray
    box: np.ndarray
    noise: np.ndarray

    def __len__(self) -> int:
        return len(self.flip)

    def rows(self, part: slice) -> InputParameters:
        """Some of the images."""
        return InputParameters(*(getattr(self, entry.name)[part] for entry in dataclasses.fields(self)))


def draw_inputs(cfg: InputConfig, count: int, seed: int, first: int = 0) -> InputParameters:
    """Draw images first ... first + count - 1 of a stream; image i depends on (seed, first + i) alone.

    Args:
        cfg: size, probabilities, ranges.
        count: B.
        seed: 63-bit seed of a stream.
        first: number of the first image within the stream.
    """
    u = uniform_rows(count, _DRAWS, stream_seed(seed, _GEOMETRY), first)
    room = 2 * cfg.pad + 1
    return InputParameters(
        flip=u[:, 0] < cfg.flip,
        top=(u[:, 1] * room).astype(np.int64),
        left=(u[:, 2] * room).astype(np.int64),
        box=np.where(u[:, 3, None] < cfg.erase, erase_boxes(cfg, u[:, 4:]), 0),
        noise=np.array([stream_seed(seed, _NOISE, first + number) for number in range(count)], dtype=np.int64),
    )


def erase_boxes(cfg: InputConfig, u: np.ndarray) -> np.ndarray:
    """Boxes of random erasing (the rule of timm's RandomErasing).

    Ten times: area = height * width * U(erase_area), aspect = exp(U(ln erase_aspect)), both sides rounded; the first
    that is smaller than the image in both directions is taken, at a uniform place.

    Args:
        cfg: size and ranges.
        u: [B, 22] uniform in [0, 1): place, then area and aspect of each try.

    Returns:
        [B, 4] int64: top, left, height, width in pixels; all 0 where no try fits.
    """
    height, width = cfg.size
    draws = u[:, 2:].reshape(len(u), _TRIES, 2)
    area = height * width * (cfg.erase_area[0] + (cfg.erase_area[1] - cfg.erase_area[0]) * draws[..., 0])
    low, high = (math.log(bound) for bound in cfg.erase_aspect)
    aspect = np.exp(low + (high - low) * draws[..., 1])
    tall, wide = (np.rint(np.sqrt(x)).astype(np.int64) for x in (area * aspect, area / aspect))  # [B, tries]
    fits = (tall < height) & (wide < width)
    chosen = fits.argmax(1)[:, None]
    tall, wide = (np.take_along_axis(x, chosen, 1)[:, 0] for x in (tall, wide))
    top = (u[:, 0] * (height - tall + 1)).astype(np.int64)
    left = (u[:, 1] * (width - wide + 1)).astype(np.int64)
    return np.where(fits.any(1)[:, None], np.stack([top, left, tall, wide], axis=1), 0)


def resize(image: Image.Image, size: tuple[int, int], flip: bool) -> Tensor:
    """Bicubic resize with Pillow, mirrored if asked.

    Args:
        image: RGB.
        size: height, width.
        flip: mirror left to right.

    Returns:
        [3, H, W] uint8.
    """
    pixels = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return torch.from_numpy((pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1).copy())


class InputFinish:
    """Finish resized and mirrored images: padded crop -> [0, 1] -> normalise -> erase.

    Args:
        cfg: size, padding, mean and standard deviation.
        device: where images and results lie.
    """

    def __init__(self, cfg: InputConfig, device: torch.device) -> None:
        self._pad, self._device = cfg.pad, device
        self._mean = torch.tensor(cfg.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(cfg.std, device=device).view(3, 1, 1)

    def __call__(self, images: Tensor, parameters: InputParameters, out: Tensor) -> None:
        """Finish B images.

        Args:
            images: [B, 3, H, W] uint8.
            parameters: of the same images. Their `flip` is not looked at.
            out: [B, 3, H, W] float32, written.
        """
        step = max(1, _CHUNK // images[0, 0].numel()) if self._device.type == "cpu" else len(images)
        for start in range(0, len(images), step):
            rows = slice(start, start + step)
            shifted = self._shift(images[rows], parameters.top[rows], parameters.left[rows])
            out[rows].copy_(shifted).div_(255).sub_(self._mean).div_(self._std)
        self._erase(parameters, out)

    def _shift(self, images: Tensor, top: np.ndarray, left: np.ndarray) -> Tensor:
        """Crops at (top, left) of the images with black all around them."""
        height, width = images.shape[2:]
        shifted = torch.zeros_like(images)
        down, right = (top - self._pad).tolist(), (left - self._pad).tolist()
        for source, target, y, x in zip(images, shifted, down, right, strict=True):
            part = source[:, max(0, y) : max(0, height + y), max(0, x) : max(0, width + x)]
            y, x = max(0, -y), max(0, -x)
            target[:, y : y + part.shape[1], x : x + part.shape[2]] = part
        return shifted

    def _erase(self, parameters: InputParameters, out: Tensor) -> None:
        """Noise is drawn on the CPU whatever the device, so that it is the same everywhere."""
        erased = np.flatnonzero(parameters.box[:, 2:].all(1)).tolist()
        if not erased:
            return
        boxes = parameters.box[erased].tolist()
        seeds = parameters.noise[erased].tolist()
        noise = [
            torch.randn(3, tall, wide, generator=torch.Generator().manual_seed(seed))
            for seed, (_, _, tall, wide) in zip(seeds, boxes, strict=True)
        ]
        if out.is_cuda:  # one copy for all of them
            flat = torch.cat([box.flatten() for box in noise]).pin_memory().to(out.device, non_blocking=True)
            parts = torch.split(flat, [box.numel() for box in noise])
            noise = [part.view_as(box) for part, box in zip(parts, noise, strict=True)]
        for number, (top, left, tall, wide), box in zip(erased, boxes, noise, strict=True):
            out[number, :, top : top + tall, left : left + wide] = box
