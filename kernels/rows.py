"""What kernels over whole rows of tokens share: tiles, the arithmetic of LayerNorm, sums in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from personvit.kernels.aot import Build

MAX_WIDTH = 2048
WARPS = 4
ELEMENTS = 4
"""Elements of a row in a thread: 16 bytes of float32, 8 of bfloat16. With more, Triton would load the two types in
different layouts and convert between them through shared memory, at a dozen barriers a tile."""
RESIDENT_WARPS = 132 * 32
"""Warps of a backward, at most: 32 on each of the 132 multiprocessors of an H100, the same on every GPU."""
FORWARD_REGISTERS = 40
BACKWARD_REGISTERS = 64
"""Budgets a thread: 48 and 32 warps fit on a multiprocessor."""
SHARED = 256
"""Budget of shared memory in bytes: reductions across warps."""
TALL = (128, 16)
"""Tile (partials, columns) of `sum_partials` where many partials are narrow."""
WIDE = (16, 128)
"""... and where few partials are wide."""
WIDE_FROM = 4096


@triton.jit
def statistics(x, inside, eps, WIDTH: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of the rows of x [ROWS, BLOCK], which is 0 in columns outside."""
    mean = tl.sum(x, 1) / WIDTH
    centred = tl.where(inside, x - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)


@triton.jit
def pull_back(slope, x_hat, rstd, WIDTH: tl.constexpr):
    """Gradient of the rows before the norm, from `slope`: that of the normalised rows x_hat. Both 0 outside."""
    along_one = tl.sum(slope, 1) / WIDTH
    along_x = tl.sum(slope * x_hat, 1) / WIDTH
    return rstd[:, None] * (slope - along_one[:, None] - x_hat * along_x[:, None])


@triton.jit(do_not_specialize=["count"])
def _sum_partials(partials, out, count, WIDTH: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    wide = columns < WIDTH
    kind = tl.program_id(1).to(tl.int64)
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, count, PARTS):
        parts = start + tl.arange(0, PARTS)
        offsets = (kind * count + parts)[:, None] * WIDTH + columns[None, :]
        total += tl.load(partials + offsets, mask=(parts < count)[:, None] & wide[None, :], other=0.0)
    tl.store(out + kind * WIDTH + columns, tl.sum(total, 0), mask=wide)


def sum_partials(partials: Tensor) -> Tensor:
    """Sum over the second axis in an order that the shape alone decides.

    Args:
        partials: [K, P, M] float32, contiguous.

    Returns:
        [K, M] float32.
    """
    kinds, count, width = partials.shape
    if not partials.numel():
        return torch.zeros(kinds, width, device=partials.device)
    out = torch.empty(kinds, width, device=partials.device)
    parts, columns = WIDE if width >= WIDE_FROM else TALL
    with torch.cuda.device_of(partials):
        _sum_partials[(triton.cdiv(width, columns), kinds)](
            partials, out, count, WIDTH=width, PARTS=parts, COLUMNS=columns, num_warps=WARPS, num_stages=1
        )
    return out


def tile_of(width: int) -> dict[str, int]:
    """Constants of a kernel over whole rows of some width: one row, or several if they are short."""
    block = max(16, triton.next_power_of_2(width))
    return {"WIDTH": width, "BLOCK": block, "ROWS": max(1, WARPS * 32 * ELEMENTS // block)}


def warps_of(tile: dict[str, int]) -> int:
    """Warps for a tile."""
    return max(WARPS, tile["BLOCK"] // (32 * ELEMENTS))


def programs_of(count: int, tile: dict[str, int]) -> tuple[int, int]:
    """Programs of a backward over `count` rows, and the tiles that each of them takes."""
    tiles = triton.cdiv(count, tile["ROWS"])
    programs = min(RESIDENT_WARPS // warps_of(tile), tiles)
    return programs, triton.cdiv(tiles, programs)


def row_build(name: str, kernel: Any, signature: dict[str, str], width: int, registers: int, absent: str = "") -> Build:
    """A configuration of a kernel over whole rows; arguments named in `absent` are None."""
    present = {argument: kind for argument, kind in signature.items() if argument not in absent.split()}
    tile = tile_of(width)
    constexprs = {**tile, **dict.fromkeys(absent.split())}
    return Build(name, kernel, present, constexprs, warps_of(tile), 1, registers, SHARED)


def sum_builds() -> list[Build]:
    """Both tiles of `sum_partials`."""
    signature = {"partials": "*fp32", "out": "*fp32", "count": "i32"}
    return [
        Build(
            f"norm and assemble sum {parts}x{columns}",
            _sum_partials,
            signature,
            {"WIDTH": width, "PARTS": parts, "COLUMNS": columns},
            WARPS,
            1,
            registers=48,
            shared=2048,
        )
        for width, (parts, columns) in ((384, TALL), (129 * 384, WIDE))
    ]
