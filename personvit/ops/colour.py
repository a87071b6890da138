"""Colour, blur, solarize and normalisation of whole batches of 8-bit views.

Results are the same bit for bit for every implementation, for every number of threads and however a batch is cut:
`personvit.data.photometry` rounds factors and kernels to multiples of a power of two so small that every product and
every sum of 8-bit values is exact in float32, so the order of the additions does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from personvit.ops import backend, native

SOLARIZE_THRESHOLD = 128
COLOUR_UNIT = 2.0**-12
"""What the mean grey adds is rounded to a multiple of this; 8-bit values times such factors: exact below 4096."""

_LUMA = (299, 587, 114)  # thousandths
_EXACT_SUM = 2**24 // 255  # pixels whose 8-bit values float32 adds up without rounding
_CHUNK = 1 << 18
"""Pixels that the reference works on together on a CPU: 3 MiB, so that most of it stays in the caches."""


def photometry(
    views: Tensor,
    maps: Tensor,
    kernels: Tensor,
    radius: Tensor,
    solarize: Tensor,
    mean: Tensor,
    deviation: Tensor,
    out: Tensor,
) -> None:
    """Finish N resized views: affine map of RGB, blur, solarize, [0, 1], normalise; 8-bit values after each step.

    `maps`, `kernels`, `radius` and `solarize` lie on the host, where they are drawn, whatever the device of the views:
    which views are blurred is decided there, and nothing waits for the device.

    Args:
        views: [N, 3, H, W] uint8.
        maps: [N, 3, 4] float32: for each channel three factors, and what the mean grey of the view adds.
        kernels: [N, K] float32, K odd: weights of a separable blur, from the top down and from left to right alike.
        radius: [N] int64, reach of the blur; 0: none. At most K // 2, and less than H and W: views are reflected at
            their edges. The weights beyond it are 0.
        solarize: [N] bool, invert what is 128 or more.
        mean: [3] float32, on the device of the views.
        deviation: [3] float32, on the device of the views.
        out: [N, 3, H, W] float32, contiguous, on the device of the views; written.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: a radius that the views or the kernels cannot supply.
    """
    _check(views, maps, kernels, radius, solarize, out)
    if len(views):
        backend.call("photometry", views.device.type, views, maps, kernels, radius, solarize, mean, deviation, out)


def _check(views: Tensor, maps: Tensor, kernels: Tensor, radius: Tensor, solarize: Tensor, out: Tensor) -> None:
    count = len(views)
    if views.dim() != 4 or views.shape[1] != 3 or views.dtype != torch.uint8:
        raise ValueError(f"photometry needs views [N, 3, H, W] uint8, got {list(views.shape)} {views.dtype}")
    if out.shape != views.shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"photometry: out must be a contiguous {list(views.shape)} float32, got {list(out.shape)}")
    wanted = {"maps": (maps, (count, 3, 4)), "radius": (radius, (count,)), "solarize": (solarize, (count,))}
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(f"photometry: {name} must be {list(shape)}, got {list(tensor.shape)}")
    if kernels.dim() != 2 or len(kernels) != count or kernels.shape[1] % 2 == 0:
        raise ValueError(f"photometry: kernels must be [{count}, K], K odd, got {list(kernels.shape)}")


def _reference(
    views: Tensor,
    maps: Tensor,
    kernels: Tensor,
    radius: Tensor,
    solarize: Tensor,
    mean: Tensor,
    deviation: Tensor,
    out: Tensor,
) -> None:
    limit = min(kernels.shape[1] // 2, *(side - 1 for side in views.shape[2:]))
    if int(radius.min()) < 0 or int(radius.max()) > limit:
        raise RuntimeError(f"photometry: radii of {int(radius.min())} to {int(radius.max())}, expected 0 to {limit}")
    device = views.device
    maps = maps.to(device)
    step = max(1, _CHUNK // views[0, 0].numel()) if device.type == "cpu" else len(views)
    for start in range(0, len(views), step):
        rows = slice(start, start + step)
        y = apply_colour(views[rows].float(), maps[rows], out[rows])
        _blur_some(y, kernels[rows], radius[rows])
        inverted = solarize[rows].nonzero().flatten().to(device)
        if len(inverted):
            some = y[inverted]
            y[inverted] = torch.where(some >= SOLARIZE_THRESHOLD, 255 - some, some)
        y.div_(255).sub_(mean.view(3, 1, 1)).div_(deviation.view(3, 1, 1))


def _blur_some(images: Tensor, kernels: Tensor, radius: Tensor) -> None:
    """Blur, in place, those of [N, 3, H, W] whose radius [N] is not 0."""
    if images.is_cuda:  # few launches count for more there than few products
        groups = [(radius > 0, int(radius.max()))]
    else:
        groups = [(radius == reach, reach) for reach in sorted(set(radius.tolist()))]
    middle = kernels.shape[1] // 2
    for chosen, reach in groups:
        if reach:
            rows = chosen.nonzero().flatten()
            used = kernels[rows, middle - reach : middle + reach + 1].to(images.device)
            rows = rows.to(images.device)
            images[rows] = blur(images[rows], used)


def apply_colour(images: Tensor, maps: Tensor, out: Tensor) -> Tensor:
    """Map RGB, clip and round to 8-bit values.

    Args:
        images: [N, 3, H, W] float32, whole numbers in [0, 255].
        maps: [N, 3, 4] float32, on the device of the images.
        out: like `images`, written and returned.
    """
    pixels = images.shape[2] * images.shape[3]
    sums = images.sum((2, 3), dtype=torch.float32 if pixels <= _EXACT_SUM else torch.float64).long()  # [N, 3]
    total = (sums * torch.tensor(_LUMA, device=images.device)).sum(1)
    # Like Pillow, which rounds the mean grey to a whole number; in integers, which no device rounds otherwise.
    mean = (2 * total + 1000 * pixels) // (2000 * pixels)  # [N]
    offset = maps[:, :, 3] * mean[:, None].float()
    offset = torch.round(offset / COLOUR_UNIT).mul_(COLOUR_UNIT)
    factors = maps[:, :, :3, None, None]  # [N, 3 out, 3 in, 1, 1]
    torch.mul(images[:, 0:1], factors[:, :, 0], out=out)
    out.addcmul_(images[:, 1:2], factors[:, :, 1]).addcmul_(images[:, 2:3], factors[:, :, 2])
    return out.add_(offset[:, :, None, None]).clamp_(0, 255).round_()


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


backend.register(
    backend.Operator(
        "photometry",
        backend.Implementation("reference", _reference, ("cpu", "cuda"), "plain torch, an operation at a time"),
        (
            backend.Implementation(
                "native", native.photometry, ("cpu",), "C++ extension, a view at a time", native.why_not
            ),
        ),
    )
)
