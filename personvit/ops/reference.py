"""Readable implementations in plain torch and Python: the truth that every faster one is tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK_ATTEMPTS = 10
_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v with the softmax in float32 or wider. [S, H, N, Dh] -> [S, H, N, Dh]."""
    logits = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])  # [S, H, N, N]
    wide = torch.promote_types(q.dtype, torch.float32)
    return logits.softmax(dim=-1, dtype=wide).to(v.dtype) @ v


def packed_attention(qkv: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    """`attention` of every sequence on its own. [T, 3, H, Dh] -> [T, H, Dh]."""
    outputs = []
    for sequences, length in groups:
        tokens, qkv = qkv[: sequences * length], qkv[sequences * length :]
        for sequence in tokens.view(sequences, length, *tokens.shape[1:]):
            q, k, v = sequence.permute(1, 2, 0, 3)[:, None]  # each [1, H, N, Dh]
            outputs.append(attention(q, k, v)[0].transpose(0, 1))
    return torch.cat(outputs)


class CounterRng:
    """splitmix64 (Steele, Lea, Flood 2014) on stream number `stream` of a seed; the same as csrc/core/rng.h."""

    def __init__(self, seed: int, stream: int) -> None:
        self._state = mix64(mix64(seed + _GAMMA) + stream * _GAMMA)

    def next(self) -> int:
        """64 random bits."""
        self._state = (self._state + _GAMMA) & _WORD
        return mix64(self._state)

    def uniform(self, low: float, high: float) -> float:
        """Uniform between the bounds, which may come in either order."""
        return low + (high - low) * ((self.next() >> 11) * 2.0**-53)

    def below(self, bound: int) -> int:
        """Uniform integer in [0, bound)."""
        return ((self.next() >> 32) * bound) >> 32


def mix64(z: int) -> int:
    """The output function of splitmix64."""
    z &= _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def portable_exp(x: float) -> float:
    """The exponential by a Taylor polynomial and four squarings: the same bits on every machine, unlike libm's."""
    r = x / 16.0
    total = 1.0
    for n in range(14, 0, -1):
        total = 1.0 + total * r / n
    for _ in range(4):
        total = total * total
    return total


def block_masks(
    targets: Tensor, height: int, width: int, seed: int, first: int, log_aspect_low: float, log_aspect_high: float
) -> Tensor:
    """Block masks by the algorithm of iBOT (bytedance/ibot, loader.py). [M] -> [M, height, width] bool."""
    masks = torch.zeros((len(targets), height, width), dtype=torch.bool)
    aspect = (log_aspect_low, log_aspect_high)
    for index, target in enumerate(targets.tolist()):
        _draw_mask(masks[index], min(target, height * width), CounterRng(seed, first + index), aspect)
    return masks.to(targets.device)


def _draw_mask(mask: Tensor, target: float, rng: CounterRng, log_aspect: tuple[float, float]) -> None:
    count = 0
    while count < target:
        for _ in range(MASK_ATTEMPTS):
            fresh = _try_block(mask, target - count, rng, log_aspect)
            if fresh:
                break
        else:
            return
        count += fresh


def _try_block(mask: Tensor, room: float, rng: CounterRng, log_aspect: tuple[float, float]) -> int:
    height, width = mask.shape
    area = rng.uniform(float((min(height, width) // 3) ** 2), room)
    aspect = portable_exp(rng.uniform(*log_aspect))  # height / width
    h = int(math.sqrt(area * aspect) + 0.5)
    w = int(math.sqrt(area / aspect) + 0.5)
    if not (0 < h < height and 0 < w < width):  # a block never spans the grid
        return 0
    top = rng.below(height - h + 1)
    left = rng.below(width - w + 1)
    block = mask[top : top + h, left : left + w]
    fresh = h * w - int(block.sum())
    if fresh > room:
        return 0
    block.fill_(True)
    return fresh
