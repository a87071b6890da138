"""Masks of the masked image modelling task: which patches of a global crop the student does not see."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from personvit import ops
from personvit.config import MasksConfig
from personvit.errors import ConfigError
from personvit.runtime.seed import stream_seed

_RATIO, _PLACE = 0, 1  # separate random streams of one seed
_SIGMAS = 6  # a normal variable exceeds them once in 1e9 draws
_ALIGNMENT = 8  # rows of a matrix product that tensor cores take without a remainder


class BlockMaskGenerator:
    """Draw masks over the patch grid of the global crops (bytedance/ibot loader.py, ImageFolderMask).

    Each crop draws on its own: one of the (mean, half width) pairs uniformly, then the ratio from
    U(mean - half width, mean + half width), then either blocks until the ratio is (nearly, never more than) reached,
    or, with shape `rand`, exactly floor(ratio * cells) cells. iBOT draws from every pair before it chooses; the
    distribution is the same.

    Crop i of a seed depends on (seed, first + i) alone, so a batch may be cut into any parts.

    Args:
        cfg: ratios, aspect range and shape.
        grid: patch rows and columns of a global crop.

    Raises:
        ConfigError: the operator cannot draw on such a grid, or with such an aspect range.
    """

    def __init__(self, cfg: MasksConfig, grid: tuple[int, int]) -> None:
        self.cfg = cfg
        self.grid = grid
        self._mean = np.asarray(cfg.ratio, dtype=np.float64)
        self._half_width = np.asarray(cfg.ratio_var, dtype=np.float64)
        try:
            ops.block_masks(torch.zeros(0), *grid, seed=0, aspect=cfg.aspect)
        except ValueError as error:
            raise ConfigError(
                f"{error} (patch grid {grid[0]}x{grid[1]} = crops.global_size / model.patch_size, "
                f"masks.aspect={list(cfg.aspect)})"
            ) from None

    def __call__(self, count: int, seed: int, first: int = 0, enabled: bool = True) -> Tensor:
        """Draw the masks of crops first ... first + count - 1.

        Args:
            count: number of crops.
            seed: 63-bit stream seed.
            first: number of the first crop within the stream.
            enabled: False (epochs before the masking starts): nothing is masked.

        Returns:
            [count, rows, columns] bool, True = masked.
        """
        height, width = self.grid
        if not enabled or count == 0:
            return torch.zeros(count, height, width, dtype=torch.bool)
        targets = self.ratios(count, seed, first) * (height * width)
        place = stream_seed(seed, _PLACE)
        if self.cfg.shape == "block":
            wanted = torch.from_numpy(targets.astype(np.float32))
            return ops.block_masks(wanted, height, width, place, first=first, aspect=self.cfg.aspect)
        keys = uniform_rows(count, height * width, place, first)
        # A cell's rank among random keys is a random permutation of the cells; ties of 53-bit keys do not occur.
        ranks = keys.argsort(axis=1).argsort(axis=1)
        masks = ranks < targets.astype(np.int64)[:, None]
        return torch.from_numpy(masks.reshape(count, height, width))

    def ratios(self, count: int, seed: int, first: int = 0) -> np.ndarray:
        """Wanted share of masked patches of each crop, [count] float64."""
        draws = uniform_rows(count, 2, stream_seed(seed, _RATIO), first)
        pair = (draws[:, 0] * len(self._mean)).astype(np.int64)
        ratios: np.ndarray = self._mean[pair] + self._half_width[pair] * (2 * draws[:, 1] - 1)
        return ratios


def mask_bound(cfg: MasksConfig, cells: int, crops: int) -> int:
    """A number of masked patches that hardly any micro-batch exceeds: mean + 6 standard deviations.

    A crop masks at most ratio * cells patches. Ratios are drawn independently, from a mixture of uniform
    distributions whose moments are known: E[r] = mean of the means, E[r^2] = mean of (mean^2 + half width^2 / 3).

    Args:
        cfg: ratios.
        cells: patches of a global crop.
        crops: global crops of a micro-batch.

    Returns:
        The bound, rounded up to a multiple of 8; at most all patches.
    """
    mean, half_width = np.asarray(cfg.ratio), np.asarray(cfg.ratio_var)
    first, second = mean.mean(), (mean**2 + half_width**2 / 3).mean()
    deviation = math.sqrt(max(0.0, second - first**2))
    wanted = cells * float(crops * first + _SIGMAS * math.sqrt(crops) * deviation)
    return min(crops * cells, math.ceil(wanted / _ALIGNMENT) * _ALIGNMENT)


def masked_patches(masks: Tensor, bound: int | None = None) -> tuple[Tensor, Tensor]:
    """Places and weights of the masked patches of some crops, padded to a fixed number on request.

    Padding rows are unmasked patches of weight 0, all different from each other: they cost time and change neither
    the loss nor a gradient. A draw beyond the bound takes the next multiple of it: nothing is cut off, and nothing is
    drawn again, either of which would change the distribution of the masks.

    Args:
        masks: [crops, N] bool, True = masked.
        bound: multiple to pad to (see `mask_bound`); None: no padding.

    Returns:
        indices: [M*] int64, flat over crops * N: the masked patches, ascending, then the padding, ascending.
        weights: [M*] float32, 1 / number of masked patches of the patch's crop; 0 for padding.
    """
    flat = masks.flatten()
    indices = flat.nonzero().flatten()
    weights = 1.0 / masks.sum(1)[indices // masks.shape[1]].float()
    if not bound:
        return indices, weights
    padding = min(len(flat), max(1, math.ceil(len(indices) / bound)) * bound) - len(indices)
    spare = flat.logical_not().nonzero().flatten()[:padding]
    return torch.cat([indices, spare]), F.pad(weights, (0, padding))


def uniform_rows(rows: int, columns: int, seed: int, first: int) -> np.ndarray:
    """[rows, columns] float64 in [0, 1), row i a function of (seed, first + i): Philox counts in blocks of 4."""
    blocks = -(-columns // 4)
    generator = np.random.Philox(key=seed)
    generator.advance(first * blocks)
    raw = generator.random_raw(rows * blocks * 4).reshape(rows, blocks * 4)[:, :columns]
    uniform: np.ndarray = (raw >> np.uint64(11)) * 2.0**-53
    return uniform
