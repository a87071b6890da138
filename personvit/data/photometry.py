"""Colour jitter, grey, blur, solarize and normalisation of whole batches of 8-bit views, on any device.

Made for the loaders whose decoder leaves resized 8-bit views behind. The operations are those of
`personvit.data.crops`, with three stated differences: hue is a rotation in YIQ (Pillow: of HSV's angle); brightness,
contrast, saturation and hue are one affine map, clipped once (Pillow clips and rounds after each, in the order drawn;
up to that and the hue the four commute); blur is a true Gaussian cut off at three standard deviations (Pillow: repeated
boxes).

Results are the same bit for bit on every device, for every number of threads and however the batch is cut: factors
and kernels are rounded to multiples of a power of two so small that every product and every sum of 8-bit values is
exact in float32, so the order of the additions does not matter.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from personvit.config import CropsConfig
from personvit.data.crops import SOLARIZE_THRESHOLD
from personvit.data.views import ViewParameters

_LUMA = np.array([0.299, 0.587, 0.114])
_COLOUR_UNIT = 2.0**-12  # 8-bit values times factors: exact while a sum stays below 4096
_BLUR_UNIT = 2.0**-15  # weights sum to 1, so every sum stays below 256
_EXACT_SUM = 2**24 // 255  # pixels whose 8-bit values float32 adds up without rounding
_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_CHUNK = 1 << 18
"""Pixels that are worked on together on a CPU: 3 MiB, so that most of it stays in the caches."""


class Photometry:
    """Finish resized views: jitter -> grey -> blur -> solarize -> [0, 1] -> normalise.

    Args:
        cfg: mean and standard deviation.
        device: where views and results lie.
    """

    def __init__(self, cfg: CropsConfig, device: torch.device) -> None:
        self._device = device
        self._mean = torch.tensor(cfg.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(cfg.std, device=device).view(3, 1, 1)

    def __call__(self, views: Tensor, parameters: ViewParameters, out: Tensor) -> None:
        """Finish N views.

        Args:
            views: [N, 3, H, W] uint8.
            parameters: of the same N views, [N, 1].
            out: [N, 3, H, W] float32, written.
        """
        maps = torch.from_numpy(colour_maps(parameters)).to(self._device)
        step = max(1, _CHUNK // views[0, 0].numel()) if self._device.type == "cpu" else len(views)
        for start in range(0, len(views), step):
            rows = slice(start, start + step)
            x = views[rows].float()
            y = apply_colour(x, maps[rows], out[rows])
            self._blur(y, parameters.sigma[rows, 0])
            solarized = np.flatnonzero(parameters.solarize[rows, 0])
            if len(solarized):
                index = self._index(solarized)
                some = y[index]
                y[index] = torch.where(some >= SOLARIZE_THRESHOLD, 255 - some, some)
            y.div_(255).sub_(self._mean).div_(self._std)

    def _blur(self, images: Tensor, sigma: np.ndarray) -> None:
        """Blur, in place, those of [N, 3, H, W] whose sigma [N] is not 0."""
        limit = min(images.shape[2], images.shape[3]) - 1  # what a reflection can supply
        radius = np.minimum(np.ceil(3 * sigma), limit).astype(np.int64)  # [N], 0: not blurred
        if self._device.type == "cpu":
            groups = [np.flatnonzero(radius == value) for value in np.unique(radius[radius > 0])]
        else:  # few launches count for more there than few products
            groups = [np.flatnonzero(radius)]
        for rows in groups:
            if len(rows):
                index = self._index(rows)
                kernels = torch.from_numpy(gaussian_kernels(sigma[rows], radius[rows])).to(self._device)
                images[index] = blur(images[index], kernels)

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self._device)


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
    maps[:, :, :3] = np.rint(maps[:, :, :3] / _COLOUR_UNIT) * _COLOUR_UNIT
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


def apply_colour(images: Tensor, maps: Tensor, out: Tensor) -> Tensor:
    """Map RGB, clip and round to 8-bit values.

    Args:
        images: [N, 3, H, W] float32, whole numbers in [0, 255].
        maps: [N, 3, 4] float32 (see `colour_maps`).
        out: like `images`, written and returned.
    """
    pixels = images.shape[2] * images.shape[3]
    sums = images.sum((2, 3), dtype=torch.float32 if pixels <= _EXACT_SUM else torch.float64)
    luma = torch.tensor(_LUMA, device=images.device)
    # Like Pillow, which rounds the mean grey to a whole number.
    mean = torch.floor((sums.double() * luma).sum(1) / pixels + 0.5)  # [N]
    offset = maps[:, :, 3] * mean[:, None].float()
    offset = torch.round(offset / _COLOUR_UNIT).mul_(_COLOUR_UNIT)
    factors = maps[:, :, :3, None, None]  # [N, 3 out, 3 in, 1, 1]
    torch.mul(images[:, 0:1], factors[:, :, 0], out=out)
    out.addcmul_(images[:, 1:2], factors[:, :, 1]).addcmul_(images[:, 2:3], factors[:, :, 2])
    return out.add_(offset[:, :, None, None]).clamp_(0, 255).round_()


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
    weights = np.exp(-(distance**2) / (2 * sigma[:, None] ** 2)) * (abs(distance) <= radius[:, None])
    whole = np.rint(weights / weights.sum(1, keepdims=True) / _BLUR_UNIT)
    whole[:, largest] += 1 / _BLUR_UNIT - whole.sum(1)
    kernels: np.ndarray = (whole * _BLUR_UNIT).astype(np.float32)
    return kernels


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Blur every image with its own kernel, down and then across, rounding to 8-bit values after each.

    Args:
        images: [N, 3, H, W] float32, whole numbers in [0, 255].
        kernels: [N, K] float32, K odd.

    Returns:
        [N, 3, H, W] float32, whole numbers.
    """
    radius = kernels.shape[1] // 2
    x = F.pad(images, (radius,) * 4, mode="reflect")
    for dim in (2, 3):
        x = (_convolve if x.is_cuda else _add_shifted)(x, kernels, dim).round_()
    return x


def _convolve(images: Tensor, kernels: Tensor, dim: int) -> Tensor:
    """Convolve [N, 3, H, W] along one dimension with [N, K], without padding."""
    count, channels = images.shape[:2]
    weights = kernels.repeat_interleave(channels, 0)  # a group of the convolution for each channel of each image
    weights = weights[:, None, :, None] if dim == 2 else weights[:, None, None, :]
    x = F.conv2d(images.reshape(1, -1, *images.shape[2:]), weights, groups=len(weights))
    return x.view(count, channels, *x.shape[2:])


def _add_shifted(images: Tensor, kernels: Tensor, dim: int) -> Tensor:
    """What `_convolve` computes, faster on a CPU for short kernels."""
    taps = kernels.shape[1]
    size = images.shape[dim] - taps + 1
    factors = kernels.t()[:, :, None, None, None].contiguous()  # [K, N, 1, 1, 1]
    out = images.narrow(dim, 0, size) * factors[0]
    for tap in range(1, taps):
        out.addcmul_(images.narrow(dim, tap, size), factors[tap])
    return out
