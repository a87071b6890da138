"""Attention of sequences of any length in masked blocks of queries and keys: what does not fit on the chip whole.

The forward pass keeps the running maximum and sum of each row (Milakov and Gimelshein 2018, arXiv:1805.02867). The
backward pass saves nothing either: one kernel finds the log-sum-exp and delta = rowsum(P * dP) of each row and the
gradient of the query, another the gradients of keys and values. Each value has one writer, so there are no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from personvit.kernels.aot import Build

LOG2_E = tl.constexpr(1.4426950408889634)


class Blocks(NamedTuple):
    """Launch of a kernel, and what it takes when compiled."""

    queries: int
    """Rows of a block of queries."""
    keys: int
    num_warps: int
    num_stages: int
    registers: int
    """Most of sm_80, sm_90 and sm_100, per thread."""
    shared: int
    """Likewise, in bytes."""


# By (bytes of an element, head dimension). Without tensor cores a product keeps its operands in registers: float32
# takes small blocks.
FORWARD = {
    (2, 32): Blocks(64, 64, 4, 2, 136, 21_504),
    (2, 64): Blocks(64, 64, 4, 2, 176, 41_984),
    (2, 128): Blocks(64, 64, 8, 2, 176, 83_968),
    (4, 32): Blocks(32, 32, 4, 1, 88, 12_288),
    (4, 64): Blocks(32, 32, 4, 1, 176, 24_576),
    (4, 128): Blocks(16, 32, 8, 1, 80, 40_960),
}
QUERY_SIDE = {
    (2, 32): Blocks(64, 64, 4, 2, 176, 29_696),
    (2, 64): Blocks(64, 64, 4, 2, 208, 58_368),
    (2, 128): Blocks(64, 64, 8, 2, 208, 115_712),
    (4, 32): Blocks(32, 32, 4, 1, 208, 16_384),
    (4, 64): Blocks(32, 32, 8, 1, 200, 32_768),
    (4, 128): Blocks(16, 16, 8, 1, 176, 32_768),
}
KEY_SIDE = {
    (2, 32): Blocks(32, 64, 4, 2, 208, 41_984),
    (2, 64): Blocks(32, 64, 4, 2, 208, 41_984),
    (2, 128): Blocks(32, 64, 8, 2, 184, 82_944),
    (4, 32): Blocks(32, 32, 4, 1, 120, 20_480),
    (4, 64): Blocks(32, 32, 4, 1, 136, 36_864),
    (4, 128): Blocks(32, 32, 8, 1, 120, 69_632),
}


@triton.jit
def load_rows(pointers, rows, tokens, MASKED: tl.constexpr):
    """[R, D] at some rows; zeros from row `tokens` on."""
    if MASKED:
        return tl.load(pointers, mask=(rows < tokens)[:, None], other=0.0)
    else:  # a branch of its own: Triton compiles what follows a return
        return tl.load(pointers)


@triton.jit
def store_rows(pointers, values, rows, tokens, MASKED: tl.constexpr):
    """Write [R, D], rounded to the type of the memory; nothing from row `tokens` on."""
    values = values.to(pointers.dtype.element_ty)
    if MASKED:
        tl.store(pointers, values, mask=(rows < tokens)[:, None])
    else:
        tl.store(pointers, values)


@triton.jit
def scores(q, k, keys, tokens, SCALE: tl.constexpr):
    """Scores q k^T / sqrt(Dh) in base 2, for exp2: [Q, K]; -inf for keys past the end."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * LOG2_E)
    return tl.where(keys[None, :] < tokens, s, float("-inf"))


@triton.jit(do_not_specialize=["tokens", "heads"])
def padded_forward(
    qkv, out, tokens, heads,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """A block of queries of one sequence and head. Program (sequence * heads + head, block)."""
    item = tl.program_id(0)
    first = (item // heads).to(tl.int64) * tokens
    width = heads * HEAD_DIM
    column = (item % heads) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    stream = qkv + first * (3 * width) + column
    rows = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = load_rows(stream + rows[:, None] * (3 * width), rows, tokens, True)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    for start in range(0, tokens, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = load_rows(stream + width + keys[:, None] * (3 * width), keys, tokens, True)
        v = load_rows(stream + 2 * width + keys[:, None] * (3 * width), keys, tokens, True)
        s = scores(q, k, keys, tokens, SCALE)
        higher = tl.maximum(top, tl.max(s, 1))  # finite, since every block holds a key
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        mixed = tl.dot(p.to(q.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        top = higher
    place = out + first * width + column + rows[:, None] * width
    store_rows(place, mixed / total[:, None], rows, tokens, True)


@triton.jit(do_not_specialize=["tokens", "heads"])
def padded_query_side(
    grad, qkv, out, lse, delta, tokens, heads,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries; log-sum-exp (in base 2) and delta of its rows, [T, H] each, for the keys."""
    item = tl.program_id(0)
    first = (item // heads).to(tl.int64) * tokens
    width = heads * HEAD_DIM
    column = (item % heads) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    stream = qkv + first * (3 * width) + column
    rows = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = load_rows(stream + rows[:, None] * (3 * width), rows, tokens, True)
    g = load_rows(grad + first * width + column + rows[:, None] * width, rows, tokens, True)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    weighted = tl.zeros([BLOCK_Q], tl.float32)  # as `total`, each key weighted with its dP
    for start in range(0, tokens, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = load_rows(stream + width + keys[:, None] * (3 * width), keys, tokens, True)
        v = load_rows(stream + 2 * width + keys[:, None] * (3 * width), keys, tokens, True)
        s = scores(q, k, keys, tokens, SCALE)
        dp = tl.dot(g, tl.trans(v), input_precision="ieee")
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        weighted = weighted * shrink + tl.sum(p * dp, 1)
        top = higher
    row_lse = top + tl.log2(total)
    row_delta = weighted / total
    places = first * heads + (item % heads) + rows * heads
    tl.store(lse + places, row_lse, mask=rows < tokens)
    tl.store(delta + places, row_delta, mask=rows < tokens)

    dq = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    for start in range(0, tokens, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = load_rows(stream + width + keys[:, None] * (3 * width), keys, tokens, True)
        v = load_rows(stream + 2 * width + keys[:, None] * (3 * width), keys, tokens, True)
        p = tl.exp2(scores(q, k, keys, tokens, SCALE) - row_lse[:, None])
        ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - row_delta[:, None])
        dq = tl.dot(ds.to(q.dtype), k, dq, input_precision="ieee")
    place = out + first * (3 * width) + column + rows[:, None] * (3 * width)
    store_rows(place, dq * SCALE, rows, tokens, True)


@triton.jit(do_not_specialize=["tokens", "heads"])
def padded_key_side(
    grad, qkv, out, lse, delta, tokens, heads,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values. Program (sequence * heads + head, block)."""
    item = tl.program_id(0)
    first = (item // heads).to(tl.int64) * tokens
    width = heads * HEAD_DIM
    column = (item % heads) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    stream = qkv + first * (3 * width) + column
    keys = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k = load_rows(stream + width + keys[:, None] * (3 * width), keys, tokens, True)
    v = load_rows(stream + 2 * width + keys[:, None] * (3 * width), keys, tokens, True)
    dk = tl.zeros([BLOCK_K, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_K, HEAD_DIM], tl.float32)
    for start in range(0, tokens, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        q = load_rows(stream + rows[:, None] * (3 * width), rows, tokens, True)
        g = load_rows(grad + first * width + column + rows[:, None] * width, rows, tokens, True)
        places = first * heads + (item % heads) + rows * heads
        # Rows past the end weigh exp2(0 - inf) = 0.
        row_lse = tl.load(lse + places, mask=rows < tokens, other=float("inf"))
        row_delta = tl.load(delta + places, mask=rows < tokens, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (SCALE * LOG2_E)  # [K, Q]
        p = tl.exp2(s - row_lse[None, :])
        dv = tl.dot(p.to(q.dtype), g, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - row_delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    # Rows of keys past the end may hold anything: they mix with no other, and are not written.
    place = out + first * (3 * width) + column + keys[:, None] * (3 * width)
    store_rows(place + width, dk * SCALE, keys, tokens, True)
    store_rows(place + 2 * width, dv, keys, tokens, True)


def forward(qkv: Tensor, out: Tensor, sequences: int, length: int) -> None:
    """Attention of one group, [S * N, 3, H, Dh] -> [S * N, H, Dh], any N >= 1."""
    heads, head_dim = out.shape[1:]
    blocks = FORWARD[qkv.element_size(), head_dim]
    grid = (sequences * heads, triton.cdiv(length, blocks.queries))
    padded_forward[grid](qkv, out, length, heads, **_options(blocks, head_dim))


def backward(grad: Tensor, qkv: Tensor, out: Tensor, sequences: int, length: int) -> None:
    """Gradient of one group into `out`, [S * N, 3, H, Dh]."""
    heads, head_dim = grad.shape[1:]
    lse = torch.empty(grad.shape[:2], dtype=torch.float32, device=grad.device)
    delta = torch.empty(grad.shape[:2], dtype=torch.float32, device=grad.device)
    blocks = QUERY_SIDE[qkv.element_size(), head_dim]
    grid = (sequences * heads, triton.cdiv(length, blocks.queries))
    padded_query_side[grid](grad, qkv, out, lse, delta, length, heads, **_options(blocks, head_dim))
    blocks = KEY_SIDE[qkv.element_size(), head_dim]
    grid = (sequences * heads, triton.cdiv(length, blocks.keys))
    padded_key_side[grid](grad, qkv, out, lse, delta, length, heads, **_options(blocks, head_dim))


def _constexprs(blocks: Blocks, head_dim: int) -> dict[str, int | float]:
    return {"HEAD_DIM": head_dim, "BLOCK_Q": blocks.queries, "BLOCK_K": blocks.keys, "SCALE": head_dim**-0.5}


def _options(blocks: Blocks, head_dim: int) -> dict[str, int | float]:
    return {**_constexprs(blocks, head_dim), "num_warps": blocks.num_warps, "num_stages": blocks.num_stages}


def builds() -> list[Build]:
    """Every launch of this module; float16 takes what bfloat16 takes."""
    found = []
    for name, kernel, table in (
        ("forward", padded_forward, FORWARD),
        ("query side", padded_query_side, QUERY_SIDE),
        ("key side", padded_key_side, KEY_SIDE),
    ):
        for (size, head_dim), blocks in table.items():
            dtype = "bf16" if size == 2 else "fp32"
            pointers = {"grad": f"*{dtype}", "qkv": f"*{dtype}", "out": f"*{dtype}", "lse": "*fp32", "delta": "*fp32"}
            types = {**pointers, "tokens": "i32", "heads": "i32"}
            found.append(
                Build(
                    name=f"attention padded {name} Dh={head_dim} {dtype}",
                    kernel=kernel,
                    signature={argument: kind for argument, kind in types.items() if argument in kernel.arg_names},
                    constexprs=_constexprs(blocks, head_dim),
                    num_warps=blocks.num_warps,
                    num_stages=blocks.num_stages,
                    registers=blocks.registers,
                    shared=blocks.shared,
                )
            )
    return found
