"""Multi-crop augmentation with Pillow: two global and several local views of one image."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from personvit.config import CropsConfig
from personvit.data.views import BRIGHTNESS, CONTRAST, SATURATION, ViewParameters, draw_views
from personvit.ops.colour import SOLARIZE_THRESHOLD


class MultiCrop:
    """Cut an image into augmented views, in the order [global 1, global 2, local 1 ... local n].

    The operations and their constants are those of DataAugmentationiBOT (bytedance/ibot main_ibot.py), which
    TransReID-SSL, PASS and SOLIDER share: random resized crop (bicubic) -> mirror -> colour jitter -> grey -> blur ->
    solarize -> [0, 1] -> normalise. All of them run on 8-bit PIL images.

    Every random number comes from the seed of the call: the same (image, seed, number) gives the same views in any
    process, and the global generators are neither read nor moved.

    Args:
        cfg: sizes, scales, probabilities.
    """

    def __init__(self, cfg: CropsConfig) -> None:
        self.cfg = cfg
        self._mean = torch.tensor(cfg.mean).view(3, 1, 1)
        self._std = torch.tensor(cfg.std).view(3, 1, 1)

    def __call__(self, image: Image.Image, seed: int, number: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        """Make the views of an image.

        Args:
            image: RGB.
            seed: 63-bit seed of a stream.
            number: of the image within the stream.

        Returns:
            Two global views [3, H, W] and the local views [3, h, w], float32, normalised.
        """
        parameters = draw_views(self.cfg, np.array([[image.height, image.width]]), seed, number)
        views = [self._normalise(self.render(image, parameters, view)) for view in range(2 + self.cfg.local_crops)]
        return views[:2], views[2:]

    def render(self, image: Image.Image, parameters: ViewParameters, view: int) -> Image.Image:
        """View `view` of an image, 8 bits, not normalised; of `parameters` the first row is used."""
        size = self.cfg.global_size if view < 2 else self.cfg.local_size
        at = (0, view)
        box = [int(getattr(parameters, side)[at]) for side in ("top", "left", "height", "width")]
        image = F.resized_crop(image, *box, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
        if parameters.flip[at]:
            image = F.horizontal_flip(image)
        if parameters.jitter[at]:
            image = _jitter(image, parameters, at)
        if parameters.grey[at]:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if parameters.sigma[at]:
            # Pillow's radius is the standard deviation, in pixels of the resized view.
            image = image.filter(ImageFilter.GaussianBlur(float(parameters.sigma[at])))
        if parameters.solarize[at]:
            image = F.solarize(image, SOLARIZE_THRESHOLD)
        return image

    def _normalise(self, image: Image.Image) -> Tensor:
        pixels: Tensor = F.pil_to_tensor(image).contiguous().float()  # [3, H, W]
        return pixels.div_(255).sub_(self._mean).div_(self._std)


def _jitter(image: Image.Image, parameters: ViewParameters, at: tuple[int, int]) -> Image.Image:
    """Brightness, contrast, saturation and hue, in the order that was drawn."""
    for step in parameters.order[at]:
        if step == BRIGHTNESS:
            image = F.adjust_brightness(image, float(parameters.brightness[at]))
        elif step == CONTRAST:
            image = F.adjust_contrast(image, float(parameters.contrast[at]))
        elif step == SATURATION:
            image = F.adjust_saturation(image, float(parameters.saturation[at]))
        else:
            image = F.adjust_hue(image, float(parameters.hue[at]))
    return image
