"""Self-attention of a packed stream of uniform short sequences, [T, 3, H, Dh] read in place, forward and backward.

Attention over 129 or 33 tokens is bound by memory, and a tile of 128 or 64 rows fits them badly: one token too many
doubles the tiles. Here the first token (CLS) is split off, which leaves the patches an exact 128 x 128 or 32 x 32 tile.
The CLS key is one more score in each row, the CLS query a product of a matrix and a vector, and both are rank-1 terms
of the gradients. One program holds the keys and values of one sequence and head on the chip: the softmax of a row
needs no rescaling, and the backward pass finds delta = rowsum(P * dP) itself. So only qkv is saved, every value is read
and written once, and each value has one writer: results do not depend on scheduling.

Other lengths fill a tile of the next power of two; what does not fit on the chip goes to `attention_padded`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from personvit.kernels import attention_padded
from personvit.kernels.aot import Build
from personvit.kernels.attention_padded import LOG2_E, load_rows, store_rows
from personvit.kernels.inputs import Obstacle, layout, require, same_type

HEAD_DIMS = (32, 64, 128)
MAX_LENGTH = 256
MAX_WIDTH = 1 << 20
"""Of H * Dh: offsets within a sequence are of 32 bits."""
RESIDENT_TYPES = (torch.float16, torch.bfloat16)
"""Types whose products run on tensor cores; operands of others would take too many registers."""


class Tile(NamedTuple):
    """Launch of a kernel that holds a whole sequence and head, and what it takes when compiled."""

    queries: int
    """Rows of queries at a time."""
    num_warps: int
    registers: int
    """Most of sm_80, sm_90 and sm_100, per thread."""
    shared: int
    """Likewise, in bytes."""
    num_stages: int = 1
    """Blocks of queries on the way or at work; keys and values are loaded at once."""


# By (rows of the tile, CLS split off, head dimension). The backward pass takes few rows at a time: a gradient of keys
# and values stays in registers, and a square tile of probabilities beside it would not.
FORWARD = {
    (32, True, 32): Tile(32, 4, 64, 4_096),
    (32, True, 64): Tile(32, 4, 64, 8_192),
    (32, True, 128): Tile(32, 4, 128, 16_384),
    (64, True, 32): Tile(64, 4, 80, 13_312),
    (64, True, 64): Tile(64, 4, 160, 25_600),
    (64, True, 128): Tile(64, 4, 208, 50_176),
    (128, True, 32): Tile(128, 8, 152, 25_600),
    (128, True, 64): Tile(128, 8, 255, 50_176),
    (128, True, 128): Tile(64, 8, 176, 83_968),
    (32, False, 32): Tile(32, 4, 48, 4_096),
    (32, False, 64): Tile(32, 4, 48, 8_192),
    (32, False, 128): Tile(32, 4, 64, 16_384),
    (64, False, 32): Tile(64, 4, 64, 13_312),
    (64, False, 64): Tile(64, 4, 128, 25_600),
    (64, False, 128): Tile(64, 4, 128, 50_176),
    (128, False, 32): Tile(128, 8, 120, 25_600),
    (128, False, 64): Tile(128, 8, 200, 50_176),
    (128, False, 128): Tile(64, 8, 152, 83_968),
}
BACKWARD = {
    (32, True, 32): Tile(32, 4, 136, 10_240),
    (32, True, 64): Tile(32, 4, 136, 16_384),
    (32, True, 128): Tile(32, 4, 192, 28_672),
    (64, True, 32): Tile(16, 4, 176, 21_504),
    (64, True, 64): Tile(32, 4, 255, 46_080),
    (64, True, 128): Tile(32, 8, 255, 82_944),
    (128, True, 32): Tile(16, 8, 248, 39_936),
    (128, True, 64): Tile(32, 8, 255, 82_944),
    (32, False, 32): Tile(32, 4, 80, 10_240),
    (32, False, 64): Tile(32, 2, 144, 16_384),
    (32, False, 128): Tile(32, 4, 144, 28_672),
    (64, False, 32): Tile(16, 4, 128, 21_504),
    (64, False, 64): Tile(32, 4, 176, 46_080),
    (64, False, 128): Tile(32, 8, 184, 82_944),
    (128, False, 32): Tile(16, 8, 160, 39_936),
    (128, False, 64): Tile(32, 8, 232, 82_944),
}


@triton.jit
def cls_softmax(q0, k, k0, SCALE: tl.constexpr):
    """Softmax of the CLS query over the patch keys [BLOCK] and the CLS key (a number)."""
    q0 *= SCALE * LOG2_E
    s = tl.sum(k.to(tl.float32) * q0[None, :], 1)
    s0 = tl.sum(k0 * q0, 0)
    top = tl.maximum(tl.max(s, 0), s0)
    p = tl.exp2(s - top)
    p0 = tl.exp2(s0 - top)
    total = tl.sum(p, 0) + p0
    return p / total, p0 / total


@triton.jit
def row_weights(q, k, k0, keys, tokens, SPLIT: tl.constexpr, SCALE: tl.constexpr):
    """exp2(score - highest score of the row) over the keys [Q, BLOCK] and the CLS key [Q], and their sum [Q]."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * LOG2_E)
    if SPLIT:
        s0 = tl.sum(q.to(tl.float32) * k0[None, :], 1) * (SCALE * LOG2_E)
        top = tl.maximum(tl.max(s, 1), s0)
        p0 = tl.exp2(s0 - top)
    else:
        s = tl.where(keys[None, :] < tokens, s, float("-inf"))
        top = tl.max(s, 1)
        p0 = tl.zeros_like(top)
    p = tl.exp2(s - top[:, None])
    return p, p0, tl.sum(p, 1) + p0


@triton.jit(do_not_specialize=["tokens", "heads"])
def resident_forward(
    qkv, out, tokens, heads,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, SPLIT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Attention of one sequence and head. Program sequence * heads + head: neighbours read neighbouring memory."""
    item = tl.program_id(0)
    first = (item // heads).to(tl.int64) * tokens
    width = heads * HEAD_DIM
    column = (item % heads) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    stream = qkv + first * (3 * width) + column
    place = out + first * width + column
    keys = tl.arange(0, BLOCK) + SPLIT
    k = load_rows((stream + width)[None, :] + keys[:, None] * (3 * width), keys, tokens, not SPLIT)
    v = load_rows((stream + 2 * width)[None, :] + keys[:, None] * (3 * width), keys, tokens, not SPLIT)
    k0 = tl.load(stream + width).to(tl.float32)
    v0 = tl.load(stream + 2 * width).to(tl.float32)
    if SPLIT:
        w, w0 = cls_softmax(tl.load(stream).to(tl.float32), k, k0, SCALE)
        mixed = tl.sum(v.to(tl.float32) * w[:, None], 0) + w0 * v0
        tl.store(place, mixed.to(out.dtype.element_ty))
    for start in range(0, BLOCK, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q) + SPLIT
        q = load_rows(stream[None, :] + rows[:, None] * (3 * width), rows, tokens, not SPLIT)
        p, p0, total = row_weights(q, k, k0, keys, tokens, SPLIT, SCALE)
        block = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        if SPLIT:
            block += p0[:, None] * v0[None, :]
        store_rows(place[None, :] + rows[:, None] * width, block / total[:, None], rows, tokens, not SPLIT)


@triton.jit(do_not_specialize=["tokens", "heads"])
def resident_backward(
    grad, qkv, out, tokens, heads,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, SPLIT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Gradient of one sequence and head. Program sequence * heads + head."""
    item = tl.program_id(0)
    first = (item // heads).to(tl.int64) * tokens
    width = heads * HEAD_DIM
    column = (item % heads) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    stream = qkv + first * (3 * width) + column
    place = out + first * (3 * width) + column
    above = grad + first * width + column
    keys = tl.arange(0, BLOCK) + SPLIT
    k = load_rows((stream + width)[None, :] + keys[:, None] * (3 * width), keys, tokens, not SPLIT)
    v = load_rows((stream + 2 * width)[None, :] + keys[:, None] * (3 * width), keys, tokens, not SPLIT)
    k0 = tl.load(stream + width).to(tl.float32)
    v0 = tl.load(stream + 2 * width).to(tl.float32)
    dk = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    if SPLIT:
        q0 = tl.load(stream).to(tl.float32)
        g0 = tl.load(above).to(tl.float32)
        w, w0 = cls_softmax(q0, k, k0, SCALE)
        dw = tl.sum(v.to(tl.float32) * g0[None, :], 1)
        dw0 = tl.sum(v0 * g0, 0)
        delta0 = tl.sum(w * dw, 0) + w0 * dw0
        dw = w * (dw - delta0)
        dw0 = w0 * (dw0 - delta0)
        dq0 = tl.sum(k.to(tl.float32) * dw[:, None], 0) + dw0 * k0
        tl.store(place, (dq0 * SCALE).to(out.dtype.element_ty))
        # Summed over their rows once, at the end: a sum across warps in every block would cost more.
        dk0 = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
        dv0 = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    for start in range(0, BLOCK, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q) + SPLIT
        q = load_rows(stream[None, :] + rows[:, None] * (3 * width), rows, tokens, not SPLIT)
        g = load_rows(above[None, :] + rows[:, None] * width, rows, tokens, not SPLIT)
        p, p0, total = row_weights(q, k, k0, keys, tokens, SPLIT, SCALE)
        p = p / total[:, None]
        dp = tl.dot(g, tl.trans(v), input_precision="ieee")
        delta = tl.sum(p * dp, 1)
        if SPLIT:
            p0 = p0 / total
            dp0 = tl.sum(g.to(tl.float32) * v0[None, :], 1)
            delta += p0 * dp0
            ds0 = p0 * (dp0 - delta)
            dk0 += ds0[:, None] * q.to(tl.float32)
            dv0 += p0[:, None] * g.to(tl.float32)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dv = tl.dot(tl.trans(p.to(q.dtype)), g, dv, input_precision="ieee")
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
        dq = tl.dot(ds, k, input_precision="ieee")
        if SPLIT:
            dq += ds0[:, None] * k0[None, :]
        store_rows(place[None, :] + rows[:, None] * (3 * width), dq * SCALE, rows, tokens, not SPLIT)
    if SPLIT:
        dk += dw[:, None] * q0[None, :]
        dv += w[:, None] * g0[None, :]
        tl.store(place + width, ((tl.sum(dk0, 0) + dw0 * q0) * SCALE).to(out.dtype.element_ty))
        tl.store(place + 2 * width, (tl.sum(dv0, 0) + w0 * g0).to(out.dtype.element_ty))
    store_rows((place + width)[None, :] + keys[:, None] * (3 * width), dk * SCALE, keys, tokens, not SPLIT)
    store_rows((place + 2 * width)[None, :] + keys[:, None] * (3 * width), dv, keys, tokens, not SPLIT)


def refuses(qkv: Tensor, groups: Sequence[tuple[int, int]]) -> Obstacle | None:
    """Why the kernels cannot compute this, with the remedy; None if they can. Arguments as of `packed_attention`."""
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        return f"qkv has shape {list(qkv.shape)}", "qkv.view(T, 3, H, Dh)"
    heads, head_dim = qkv.shape[2:]
    if head_dim not in HEAD_DIMS:
        return f"head dimension {head_dim}, the kernels take {HEAD_DIMS}", "another number of heads"
    if heads * head_dim > MAX_WIDTH:
        return f"width {heads * head_dim}, the kernels take at most {MAX_WIDTH}", "kernels.backend=auto"
    if sum(sequences * length for sequences, length in groups) != qkv.shape[0]:
        return f"groups {list(groups)} do not add up to {qkv.shape[0]} tokens", "groups of (sequences, length)"
    for sequences, length in groups:
        if sequences < 0 or length < 1:
            return f"a group of {sequences} sequences of {length} tokens", "no sequences or more, a token or more"
        if length > MAX_LENGTH:
            return f"a sequence of {length} tokens, the kernels take at most {MAX_LENGTH}", "kernels.backend=auto"
    return layout("qkv", qkv)


def packed_attention(qkv: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    """Self-attention inside every sequence of a packed token stream: softmax(q k^T / sqrt(Dh)) v.

    Args:
        qkv: [T, 3, H, Dh], contiguous, on CUDA; float32, float16 or bfloat16; Dh 32, 64 or 128.
        groups: (sequences, tokens per sequence) of each group, in the order of the stream; at most 256 tokens.

    Returns:
        [T, H, Dh], dtype of qkv. Differentiable once.

    Raises:
        UnsupportedInputError: anything else.
    """
    return _packed_attention(qkv, [sequences for sequences, _ in groups], [length for _, length in groups])


@torch.library.custom_op("personvit::packed_attention", mutates_args=())
def _packed_attention(qkv: Tensor, sequences: Sequence[int], lengths: Sequence[int]) -> Tensor:
    groups = list(zip(sequences, lengths, strict=True))
    require("packed_attention", refuses(qkv, groups), qkv=qkv)
    out = torch.empty(_out_shape(qkv), dtype=qkv.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):
        for count, length, part in _parts(qkv, groups):
            if (tile := _tile(FORWARD, qkv, length)) is None:
                attention_padded.forward(qkv[part], out[part], count, length)
            else:
                grid = (count * qkv.shape[2],)
                resident_forward[grid](qkv[part], out[part], length, qkv.shape[2], **tile)
    return out


@torch.library.custom_op("personvit::packed_attention_backward", mutates_args=())
def _packed_attention_backward(grad: Tensor, qkv: Tensor, sequences: Sequence[int], lengths: Sequence[int]) -> Tensor:
    groups = list(zip(sequences, lengths, strict=True))
    obstacle = refuses(qkv, groups) or layout("grad", grad) or same_type(grad=grad, qkv=qkv)
    if obstacle is None and grad.shape != _out_shape(qkv):
        obstacle = "grad has another shape than the output", f"a grad of shape {list(_out_shape(qkv))}"
    require("packed_attention_backward", obstacle, grad=grad, qkv=qkv)
    out = torch.empty_like(qkv)
    with torch.cuda.device_of(qkv):
        for count, length, part in _parts(qkv, groups):
            if (tile := _tile(BACKWARD, qkv, length)) is None:
                attention_padded.backward(grad[part], qkv[part], out[part], count, length)
            else:
                grid = (count * qkv.shape[2],)
                resident_backward[grid](grad[part], qkv[part], out[part], length, qkv.shape[2], **tile)
    return out


@_packed_attention.register_fake
def _(qkv: Tensor, sequences: Sequence[int], lengths: Sequence[int]) -> Tensor:
    return qkv.new_empty(_out_shape(qkv))


@_packed_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, sequences: Sequence[int], lengths: Sequence[int]) -> Tensor:
    return torch.empty_like(qkv)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    qkv, ctx.sequences, ctx.lengths = inputs
    ctx.save_for_backward(qkv)


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
    (qkv,) = ctx.saved_tensors
    return _packed_attention_backward(grad.contiguous(), qkv, ctx.sequences, ctx.lengths), None, None


_packed_attention.register_autograd(_differentiate, setup_context=_save)


def _out_shape(qkv: Tensor) -> tuple[int, int, int]:
    return qkv.shape[0], qkv.shape[2], qkv.shape[3]


def _parts(qkv: Tensor, groups: Sequence[tuple[int, int]]) -> list[tuple[int, int, slice]]:
    """(sequences, length, place in the stream) of the groups that hold anything."""
    parts, start = [], 0
    for sequences, length in groups:
        part = slice(start, start + sequences * length)
        start = part.stop
        if sequences and qkv.shape[2]:
            parts.append((sequences, length, part))
    return parts


def _tile(table: dict[tuple[int, bool, int], Tile], qkv: Tensor, length: int) -> dict[str, int | float] | None:
    """How to launch a kernel that holds a sequence of this length on the chip; None: it does not fit."""
    split = length - 1 in (32, 64, 128)
    block = length - 1 if split else max(32, triton.next_power_of_2(length))
    key = (block, split, qkv.shape[3])
    if qkv.dtype not in RESIDENT_TYPES or key not in table:
        return None
    return {**_constexprs(key, table[key]), "num_warps": table[key].num_warps, "num_stages": table[key].num_stages}


def _constexprs(key: tuple[int, bool, int], tile: Tile) -> dict[str, int | float]:
    block, split, head_dim = key
    return {"HEAD_DIM": head_dim, "BLOCK": block, "BLOCK_Q": tile.queries, "SPLIT": split, "SCALE": head_dim**-0.5}


def builds() -> list[Build]:
    """Every launch of attention; float16 takes what bfloat16 takes."""
    types = {"grad": "*bf16", "qkv": "*bf16", "out": "*bf16", "tokens": "i32", "heads": "i32"}
    found = []
    for name, kernel, table in (("forward", resident_forward, FORWARD), ("backward", resident_backward, BACKWARD)):
        for key, tile in table.items():
            block, split, head_dim = key
            found.append(
                Build(
                    name=f"attention {name} {block}{'+1' if split else ''} Dh={head_dim} bf16",
                    kernel=kernel,
                    signature={argument: kind for argument, kind in types.items() if argument in kernel.arg_names},
                    constexprs=_constexprs(key, tile),
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    registers=tile.registers,
                    shared=tile.shared,
                )
            )
    return [*found, *attention_padded.builds()]
