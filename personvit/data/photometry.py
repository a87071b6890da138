"""Colour jitter, grey, blur, solarize and normalisation of whole batches of 8-bit views, on any device.

Made for the loaders whose decoder leaves resized 8-bit views behind. The operations are those of
`personvit.data.crops`, with three stated differences: hue is a rotation in YIQ (Pillow: of HSV's angle); brightness,
contrast, saturation and hue are one affine map, clipped once (Pillow clips and rounds after each, in the order drawn;
up to that and the hue the four commute); blur is a true Gaussian cut off at three standard deviations (Pillow: repeated
boxes).

Here the numbers that were drawn become maps and kernels; `personvit.ops.photometry` applies them. Factors and kernels
are rounded to multiples of a power of two so small that every product and every sum of 8-bit values is exact in
float32: the same bits on every device, for every number of threads and however the batch is cut.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from personvit import ops
from personvit.config import CropsConfig
from personvit.data.views import ViewParameters
from personvit.ops.colour import COLOUR_UNIT

_LUMA = np.array([0.299, 0.587, 0.114])
_BLUR_UNIT = 2.0**-15  # weights sum to 1, so every sum stays below 256
_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


class Photometry:
    """Finish resized views: jitter -> grey -> blur -> solarize -> [0, 1] -> normalise.

    Args:
        cfg: mean and standard deviation.
        device: where views and results lie.
    """

    def __init__(self, cfg: CropsConfig, device: torch.device) -> None:
        self._mean = torch.tensor(cfg.mean, dtype=torch.float32, device=device)
        self._deviation = torch.tensor(cfg.std, dtype=torch.float32, device=device)

    def __call__(self, views: Tensor, parameters: ViewParameters, out: Tensor) -> None:
        """Finish N views.

        Args:
            views: [N, 3, H, W] uint8.
            parameters: of the same N views, [N, 1].
            out: [N, 3, H, W] float32, contiguous, written.
        """
        sigma = parameters.sigma[:, 0]
        limit = min(views.shape[2], views.shape[3]) - 1  # what a reflection can supply
        radius = np.minimum(np.ceil(3 * sigma), limit).astype(np.int64)  # [N], 0: not blurred
        on_host = (colour_maps(parameters), gaussian_kernels(sigma, radius), radius, parameters.solarize[:, 0])
        maps, kernels, reach, solarize = (torch.from_numpy(np.ascontiguousarray(array)) for array in on_host)
        ops.photometry(views, maps, kernels, reach, solarize, self._mean, self._deviation, out)


def colour_maps(parameters: ViewParameters) -> np.ndarray:
    """Brightness, contrast, saturation, hue and grey of N views ([N, 1]) as affine maps of RGB.

    Returns:
        [N, 3, 4] float32: three factors, and what the mean grey of the view adds.
    """
    brightness, contrast, saturation, hue = (
        getattr(parameters, name)[:, 0, None, None] for name in ("brightness", "contrast", "saturation", "hue")
    )
    grey = parameters.grey[:, 0, None, None]
    to_grey = np.broadcast_to(_LUMA, (3, 3))
    saturate = saturation * np.eye(3) + (1 - saturation) * to_grey
    matrix = brightness * contrast * (_hue_rotations(hue[:, 0, 0]) @ saturate)
    matrix = np.where(grey, to_grey @ matrix, matrix)
    # Contrast keeps the mean grey that the view has by then. Only brightness moves it.
    offset = np.broadcast_to((1 - contrast) * brightness, (len(matrix), 3, 1))
    maps: np.ndarray = np.concatenate([matrix, offset], axis=2).astype(np.float32)
    maps[:, :, :3] = np.rint(maps[:, :, :3] / COLOUR_UNIT) * COLOUR_UNIT
    return maps


def _hue_rotations(turns: np.ndarray) -> np.ndarray:
    """[N, 3, 3] maps of RGB that turn the chroma plane of YIQ; grey and luma stay."""
    cosine, sine = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    turn = np.zeros((len(turns), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = cosine
    turn[:, 1, 2], turn[:, 2, 1] = sine, -sine  # from red over yellow to green, as the angle of HSV
    rotations: np.ndarray = np.linalg.inv(_YIQ) @ turn @ _YIQ
    return rotations


def gaussian_kernels(sigma: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Weights of N blurs, each cut off at its own radius: multiples of 2^-15 that sum to 1 exactly.

    Args:
        sigma: [N] standard deviations, pixels.
        radius: [N] integers, pixels.

    Returns:
        [N, 2 * largest radius + 1] float32.
    """
    largest = int(radius.max())
    distance = np.arange(-largest, largest + 1)
    spread = np.where(radius > 0, sigma, 1.0)[:, None]  # a radius of 0 leaves the middle alone, whatever the spread
    weights = np.exp(-(distance**2) / (2 * spread**2)) * (abs(distance) <= radius[:, None])
    whole = np.rint(weights / weights.sum(1, keepdims=True) / _BLUR_UNIT)
    whole[:, largest] += 1 / _BLUR_UNIT - whole.sum(1)
    kernels: np.ndarray = (whole * _BLUR_UNIT).astype(np.float32)
    return kernels
