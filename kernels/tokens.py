"""Token assembly: mask token, CLS token and positions in one pass over the patches of a resolution.

A program owns a tile of patches x columns and walks over some crops, so that positions are read once for all of them.
In the backward it writes gradients of patches and keeps the sums over its crops, in their order, for positions, CLS and
mask token; `sum_partials` adds up the programs, again in a fixed order. No schedule changes a bit of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from personvit.kernels import inputs
from personvit.kernels.aot import Build
from personvit.kernels.gather import builds as gather_builds
from personvit.kernels.gather import gather_rows, refuses_gather_rows
from personvit.kernels.rows import WARPS, sum_partials

__all__ = ["assemble_tokens", "builds", "gather_rows", "refuses", "refuses_gather_rows"]

TILE = (32, 64)
"""Patches x columns: whole 64-byte sectors in both layouts of the patches, and no idle lanes at 32 or 128 patches."""
CROPS_FORWARD = 4
CROPS_BACKWARD = 8
"""Crops that a program walks over: more save reads of positions and partial sums, fewer keep a GPU busy."""
REGISTERS = 128
"""Budget a thread: four programs fit on a multiprocessor."""
SHARED = 16384
"""Budget in bytes: a tile changes its layout if patches are transposed."""


@triton.jit
def _place(DOWN: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Group of crops, tile of patches (of DOWN) and tile of columns of this program; columns vary fastest."""
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    return (program // (across * DOWN)).to(tl.int64), program // across % DOWN, program % across


@triton.jit
def _offsets(n, columns, LENGTH: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Offsets of a tile in the patches of a crop."""
    if TRANSPOSED:
        return columns[None, :] * LENGTH + n[:, None]
    else:
        return n[:, None] * WIDTH + columns[None, :]


@triton.jit(do_not_specialize=["count"])
def _assemble_forward(
    patches, masks, masked_embed, cls_token, positions, out, count,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr,
    CROPS: tl.constexpr, DOWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group, tile, column_tile = _place(DOWN, WIDTH, COLUMNS)
    n = tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    there, wide = n < LENGTH, columns < WIDTH
    inside = there[:, None] & wide[None, :]
    table = tl.load(positions + (1 + n)[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    cls = tl.load(cls_token + columns, mask=wide, other=0.0).to(tl.float32)
    cls += tl.load(positions + columns, mask=wide, other=0.0).to(tl.float32)
    offsets = _offsets(n, columns, LENGTH, WIDTH, TRANSPOSED)
    if masks is not None:
        embed = tl.load(masked_embed + columns, mask=wide, other=0.0)
        embed = embed.to(patches.dtype.element_ty).to(tl.float32)[None, :]  # as a patch of that type would be
    for step in range(CROPS):
        crop = group * CROPS + step
        here = inside & (crop < count)
        x = tl.load(patches + crop * (LENGTH * WIDTH) + offsets, mask=here, other=0.0).to(tl.float32)
        if masks is not None:
            masked = tl.load(masks + crop * LENGTH + n, mask=there & (crop < count), other=0) != 0
            x = tl.where(masked[:, None], embed, x)
        first = out + crop * ((1 + LENGTH) * WIDTH)
        tokens = (x + table).to(out.dtype.element_ty)
        tl.store(first + (1 + n)[:, None] * WIDTH + columns[None, :], tokens, mask=here)
        if tile == 0:
            tl.store(first + columns, cls.to(out.dtype.element_ty), mask=wide & (crop < count))


@triton.jit(do_not_specialize=["count"])
def _assemble_backward(
    grad, masks, d_patches, position_sums, embed_sums, count,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr,
    CROPS: tl.constexpr, DOWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group, tile, column_tile = _place(DOWN, WIDTH, COLUMNS)
    n = tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    there, wide = n < LENGTH, columns < WIDTH
    inside = there[:, None] & wide[None, :]
    rows = (1 + n)[:, None] * WIDTH + columns[None, :]
    offsets = _offsets(n, columns, LENGTH, WIDTH, TRANSPOSED)
    d_positions = tl.zeros([ROWS, COLUMNS], tl.float32)
    d_embed = tl.zeros([ROWS, COLUMNS], tl.float32)
    d_cls = tl.zeros([COLUMNS], tl.float32)
    for step in range(CROPS):
        crop = group * CROPS + step
        here = inside & (crop < count)
        first = grad + crop * ((1 + LENGTH) * WIDTH)
        dx = tl.load(first + rows, mask=here, other=0.0).to(tl.float32)
        d_positions += dx
        if masks is not None:
            masked = tl.load(masks + crop * LENGTH + n, mask=there & (crop < count), other=0) != 0
            d_embed += tl.where(masked[:, None], dx, 0.0)
            dx = tl.where(masked[:, None], 0.0, dx)
        target = d_patches + crop * (LENGTH * WIDTH) + offsets
        tl.store(target, dx.to(d_patches.dtype.element_ty), mask=here)
        if tile == 0:
            d_cls += tl.load(first + columns, mask=wide & (crop < count), other=0.0).to(tl.float32)
    sums = position_sums + group * ((1 + LENGTH) * WIDTH)
    tl.store(sums + rows, d_positions, mask=inside)
    if tile == 0:
        tl.store(sums + columns, d_cls, mask=wide)
    if masks is not None:
        tl.store(embed_sums + (group * DOWN + tile) * WIDTH + columns, tl.sum(d_embed, 0), mask=wide)


def _transposed(patches: Tensor) -> bool:
    """Whether [B, N, D] is the view of a contiguous [B, D, N]: what a convolution writes."""
    return not patches.is_contiguous() and patches.transpose(1, 2).is_contiguous()


def refuses(
    patches: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    masked_embed: Tensor | None,
    cls_token: Tensor,
    positions: Sequence[Tensor],
) -> inputs.Obstacle | None:
    """Why `assemble_tokens` cannot compute these: (reason, remedy), or None."""
    if not patches or len(patches) != len(masks) or len(patches) != len(positions):
        counts = f"{len(patches)} patches, {len(masks)} masks, {len(positions)} positions"
        return counts, "one of each for every resolution, at least one"
    if masked_embed is None and any(mask is not None for mask in masks):
        return "masks without a masked_embed", "pass the mask token, or no masks"
    vectors = [("cls_token", cls_token)] + ([] if masked_embed is None else [("masked_embed", masked_embed)])
    for name, vector in vectors:
        obstacle = inputs.layout(name, vector)
        if obstacle is not None:
            return obstacle
        if vector.dim() != 1 or vector.shape != cls_token.shape or vector.device != patches[0].device:
            return f"{name} of shape {list(vector.shape)} on {vector.device}", "[D], on the device of the patches"
    for tensors in zip(patches, masks, positions, strict=True):
        obstacle = _refuses_resolution(*tensors, cls_token.shape[0])
        if obstacle is not None:
            return obstacle
    return inputs.same_type(**{f"patches[{i}]": tensor for i, tensor in enumerate(patches)}) or inputs.same_type(
        **{f"positions[{i}]": tensor for i, tensor in enumerate(positions)}
    )


def _refuses_resolution(tokens: Tensor, mask: Tensor | None, table: Tensor, width: int) -> inputs.Obstacle | None:
    if tokens.dim() != 3 or tokens.shape[2] != width:
        return f"patches of shape {list(tokens.shape)}", f"[B, N, {width}]"
    obstacle = inputs.layout("patches", tokens.transpose(1, 2) if _transposed(tokens) else tokens)
    obstacle = obstacle or inputs.layout("positions", table)
    if obstacle is None and mask is not None:
        obstacle = inputs.layout("a mask", mask, (torch.bool,))
    if obstacle is not None:
        return obstacle
    batch, length, _ = tokens.shape
    if table.shape != (1 + length, width):
        return f"positions of shape {list(table.shape)} for {length} patches", f"[{1 + length}, {width}]"
    if mask is not None and mask.shape != (batch, length):
        return f"a mask of shape {list(mask.shape)} for {length} patches of {batch} crops", f"[{batch}, {length}]"
    if table.device != tokens.device or (mask is not None and mask.device != tokens.device):
        return "tensors on several devices", "move all to one with .to()"
    return None


def _tiles(length: int) -> int:
    # A crop without patches still has its CLS token.
    return max(1, triton.cdiv(length, TILE[0]))


def _launch(
    kernel: Any, tensors: tuple[Tensor | None, ...], count: int, shape: tuple[int, int], crops: int, transposed: bool
) -> None:
    """Run a kernel over `count` crops of patches [N, D]."""
    length, width = shape
    groups = triton.cdiv(count, crops)
    kernel[(groups * _tiles(length) * triton.cdiv(width, TILE[1]),)](
        *tensors, count, LENGTH=length, WIDTH=width, TRANSPOSED=transposed,
        CROPS=crops, DOWN=_tiles(length), ROWS=TILE[0], COLUMNS=TILE[1], num_warps=WARPS, num_stages=1,
    )  # fmt: skip


def _stream(patches: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
    rows = sum(tokens.shape[0] * (1 + tokens.shape[1]) for tokens in patches)
    dtype = torch.promote_types(patches[0].dtype, positions[0].dtype)
    return torch.empty(rows, patches[0].shape[2], dtype=dtype, device=patches[0].device)


@torch.library.custom_op("personvit::assemble_tokens", mutates_args=())
def _assemble_tokens(
    patches: Sequence[Tensor],
    masks: Sequence[Tensor],
    mask_of: Sequence[int],
    masked_embed: Tensor | None,
    cls_token: Tensor,
    positions: Sequence[Tensor],
) -> Tensor:
    """`mask_of`: for each resolution the number of its mask, or -1."""
    chosen = [masks[i] if i >= 0 else None for i in mask_of]
    obstacle = refuses(patches, chosen, masked_embed, cls_token, positions)
    seen = {f"patches[{i}]": tokens for i, tokens in enumerate(patches)}
    inputs.require("assemble_tokens", obstacle, cls_token=cls_token, **seen)
    out = _stream(patches, positions)
    start = 0
    with torch.cuda.device_of(out):
        for tokens, mask, table in zip(patches, chosen, positions, strict=True):
            count, length, width = tokens.shape
            stop = start + count * (1 + length)
            if count:
                bits = None if mask is None else mask.view(torch.uint8)
                tensors = (tokens, bits, masked_embed, cls_token, table, out[start:stop])
                _launch(_assemble_forward, tensors, count, (length, width), CROPS_FORWARD, _transposed(tokens))
            start = stop
    return out


@_assemble_tokens.register_fake
def _(patches, masks, mask_of, masked_embed, cls_token, positions):
    return _stream(patches, positions)


def _patch_gradients(
    grad: Tensor, counts: Sequence[int], lengths: Sequence[int], transposed: Sequence[bool], dtype: torch.dtype
) -> list[Tensor]:
    """Gradients in the layout of the patches, so that a convolution's backward finds its own."""
    width = grad.shape[1]
    return [
        torch.empty(count, width, length, dtype=dtype, device=grad.device).transpose(1, 2)
        if turned
        else torch.empty(count, length, width, dtype=dtype, device=grad.device)
        for count, length, turned in zip(counts, lengths, transposed, strict=True)
    ]


@torch.library.custom_op("personvit::assemble_tokens_backward", mutates_args=())
def _assemble_tokens_backward(
    grad: Tensor,
    masks: Sequence[Tensor],
    mask_of: Sequence[int],
    counts: Sequence[int],
    lengths: Sequence[int],
    transposed: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients, one list: of patches in `dtype`, then float32 of positions per resolution, and of masked_embed."""
    width, device = grad.shape[1], grad.device
    d_patches = _patch_gradients(grad, counts, lengths, transposed, dtype)
    groups = [triton.cdiv(count, CROPS_BACKWARD) for count in counts]
    parts = [g * _tiles(length) if i >= 0 else 0 for g, length, i in zip(groups, lengths, mask_of, strict=True)]
    embed_sums = torch.empty(1, sum(parts), width, device=device)
    d_positions = []
    start = part = 0
    with torch.cuda.device_of(grad):
        for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            stop = start + count * (1 + length)
            sums = torch.empty(1, groups[i], (1 + length) * width, device=device)
            if count:
                bits = masks[mask_of[i]].view(torch.uint8) if mask_of[i] >= 0 else None
                tensors = (grad[start:stop], bits, d_patches[i], sums, embed_sums[0, part : part + parts[i]])
                _launch(_assemble_backward, tensors, count, (length, width), CROPS_BACKWARD, transposed[i])
            d_positions.append(sum_partials(sums).view(1 + length, width))
            start, part = stop, part + parts[i]
    return [*d_patches, *d_positions, sum_partials(embed_sums).view(width)]


@_assemble_tokens_backward.register_fake
def _(grad, masks, mask_of, counts, lengths, transposed, dtype):
    width = grad.shape[1]
    d_positions = [torch.empty(1 + length, width, device=grad.device) for length in lengths]
    d_patches = _patch_gradients(grad, counts, lengths, transposed, dtype)
    return [*d_patches, *d_positions, torch.empty(width, device=grad.device)]


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    patches, masks, mask_of, masked_embed, cls_token, positions = inputs
    ctx.mask_of = list(mask_of)
    ctx.counts, ctx.lengths = ([tokens.shape[axis] for tokens in patches] for axis in (0, 1))
    ctx.transposed = [_transposed(tokens) for tokens in patches]
    ctx.dtypes = (
        patches[0].dtype,
        positions[0].dtype,
        cls_token.dtype,
        None if masked_embed is None else masked_embed.dtype,
    )
    ctx.save_for_backward(*masks)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dtype, table_dtype, cls_dtype, embed_dtype = ctx.dtypes
    masks = list(ctx.saved_tensors)
    gradients = torch.ops.personvit.assemble_tokens_backward(
        grad.contiguous(), masks, ctx.mask_of, ctx.counts, ctx.lengths, ctx.transposed, dtype
    )
    resolutions = len(ctx.counts)
    d_patches, d_positions = gradients[:resolutions], gradients[resolutions:-1]
    # A tensor of its own: were it part of another gradient, an optimiser's work in place would reach both.
    d_cls = torch.stack([table[0] for table in d_positions]).sum(0)
    d_embed = None if embed_dtype is None else gradients[-1].to(embed_dtype)
    d_tables = [table.to(table_dtype) for table in d_positions]
    return d_patches, [None] * len(masks), None, d_embed, d_cls.to(cls_dtype), d_tables


_assemble_tokens.register_autograd(_gradient, setup_context=_context)


def assemble_tokens(
    patches: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    masked_embed: Tensor | None,
    cls_token: Tensor,
    positions: Sequence[Tensor],
) -> Tensor:
    """`personvit.ops.tokens.assemble_tokens`, one kernel a resolution.

    Patches are contiguous, or the view [B, N, D] of a contiguous [B, D, N].

    Raises:
        UnsupportedInputError: arguments that `refuses` names.
    """
    given = [mask for mask in masks if mask is not None]
    mask_of, number = [], 0
    for mask in masks:
        mask_of.append(-1 if mask is None else number)
        number += mask is not None
    embed = masked_embed if given else None  # without a mask it takes no part
    out: Tensor = torch.ops.personvit.assemble_tokens(list(patches), given, mask_of, embed, cls_token, list(positions))
    return out


def builds() -> list[Build]:
    """Every shipped configuration: both resolutions of the published recipes, both layouts of the patches; gathers."""
    return gather_builds() + [
        build
        for width in (384, 768)
        for low in ("bf16", "fp32")
        for length, masked, turned in ((128, True, True), (128, True, False), (32, False, True), (32, False, False))
        for build in _builds_of(length, width, low, masked, turned)
    ]


def _builds_of(length: int, width: int, low: str, masked: bool, turned: bool) -> list[Build]:
    name = f"assemble {length}x{width} {low} patches{', masked' * masked}{', transposed' * turned}"
    shape = {
        "LENGTH": length,
        "WIDTH": width,
        "TRANSPOSED": turned,
        "DOWN": _tiles(length),
        "ROWS": TILE[0],
        "COLUMNS": TILE[1],
    }
    mask, absent = ({"masks": "*u8"}, {}) if masked else ({}, {"masks": None})
    embed, no_embed = ({"masked_embed": "*fp32"}, {}) if masked else ({}, {"masked_embed": None})
    stream = {"cls_token": "*fp32", "positions": "*fp32", "out": "*fp32"}
    forward = {"patches": f"*{low}", **mask, **embed, **stream, "count": "i32"}
    sums = {"position_sums": "*fp32", "embed_sums": "*fp32"}
    backward = {"grad": "*fp32", **mask, "d_patches": f"*{low}", **sums, "count": "i32"}
    constexprs: dict[str, Any] = {**shape, **absent}
    return [
        Build(
            f"{name} forward", _assemble_forward, forward, {**constexprs, **no_embed, "CROPS": CROPS_FORWARD},
            WARPS, 1, REGISTERS, SHARED,
        ),
        Build(
            f"{name} backward", _assemble_backward, backward, {**constexprs, "CROPS": CROPS_BACKWARD},
            WARPS, 1, REGISTERS, SHARED,
        ),
    ]  # fmt: skip
