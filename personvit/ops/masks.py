"""Block masks of masked image modelling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from personvit.ops import backend, native, reference

MAX_GRID_SIDE = 64
"""One 64-bit word holds a row of the grid (csrc/core/block_masks.h)."""
MAX_ASPECT = 1000.0


def block_masks(
    targets: Tensor,
    height: int,
    width: int,
    seed: int,
    first: int = 0,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """Random unions of rectangles over a patch grid (bytedance/ibot, loader.py; block algorithm of BEiT).

    Mask i depends only on (seed, first + i, targets[i], grid, aspect), so any split of a batch over ranks or workers
    yields the same masks, and every backend draws the same bits.

    Args:
        targets: wanted number of masked cells of each mask, [M] float32. The count never exceeds the target and seldom
            falls short by more than one cell. 0, a negative value or NaN yields an empty mask.
        height: grid rows, 1 to 64.
        width: grid columns, 1 to 64.
        seed: any 64-bit integer.
        first: number of the first mask within the seed's stream, 0 or more.
        aspect: range of height / width of a block, log-uniform, within [1/1000, 1000].

    Returns:
        [M, height, width] bool on the device of targets, True where masked. A block never spans the full height or
        width, so a grid with a side of 1 stays empty.

    Raises:
        ValueError: an argument outside of what is said above.
    """
    if targets.dim() != 1 or targets.dtype != torch.float32:
        raise ValueError(f"block_masks needs targets [M] float32, got {list(targets.shape)} {targets.dtype}")
    if not (1 <= height <= MAX_GRID_SIDE and 1 <= width <= MAX_GRID_SIDE):
        raise ValueError(
            f"block_masks: a grid of {height}x{width} cells; {MAX_GRID_SIDE}x{MAX_GRID_SIDE} is the largest. "
            f"Use a smaller image or a larger patch."
        )
    low, high = aspect
    if not (1 / MAX_ASPECT <= low <= high <= MAX_ASPECT):
        raise ValueError(f"block_masks: aspect={aspect} must be low <= high within [1/{MAX_ASPECT:g}, {MAX_ASPECT:g}]")
    if first < 0:
        raise ValueError(f"block_masks: first={first} must be 0 or more")
    signed_seed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)  # the operator takes a signed 64-bit integer
    masks: Tensor = backend.call(
        "block_masks", targets.device.type, targets, height, width, signed_seed, first, math.log(low), math.log(high)
    )
    return masks


backend.register(
    backend.Operator(
        "block_masks",
        backend.Implementation("reference", reference.block_masks, ("cpu", "cuda"), "plain Python, a mask at a time"),
        (backend.Implementation("native", native.block_masks, ("cpu", "cuda"), "C++/CUDA extension", native.why_not),),
    )
)
