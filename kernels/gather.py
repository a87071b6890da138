"""Chosen rows of a stream of tokens, and their gradient as one dense store.

The backward goes through an inverse map (row -> place among the chosen, or -1): every element of the gradient is
written once, by one program, so that nothing is filled with zeros first and no sum is atomic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from personvit.kernels import inputs
from personvit.kernels.aot import Build
from personvit.kernels.rows import WARPS

TILE = (16, 128)
"""Rows x columns: 16 bytes a load in every type, and no idle lanes at widths of 384 and 768."""
INVERSE_BLOCK = 128
"""An element a thread: with more, they would change places through shared memory before the store."""
REGISTERS = 40
"""Budget a thread: 48 warps fit on a multiprocessor."""
SHARED = 0
"""Budget in bytes: threads have nothing to tell each other."""


@triton.jit
def _place(WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of this program's tile; columns vary fastest."""
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    rows = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return rows, program % across * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit(do_not_specialize=["count", "total"])
def _gather_forward(tokens, chosen, out, count, total, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    places, columns = _place(WIDTH, ROWS, COLUMNS)
    real, wide = places < count, columns < WIDTH
    rows = tl.load(chosen + places, mask=real, other=-1)
    known = (rows >= 0) & (rows < total)
    # A row that does not exist shall be seen.
    values = tl.load(
        tokens + rows[:, None] * WIDTH + columns[None, :], mask=known[:, None] & wide[None, :], other=float("nan")
    )
    tl.store(out + places[:, None] * WIDTH + columns[None, :], values, mask=real[:, None] & wide[None, :])


@triton.jit(do_not_specialize=["count", "total"])
def _gather_inverse(chosen, inverse, count, total, BLOCK: tl.constexpr):
    """inverse[chosen[i]] = i."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(chosen + places, mask=places < count, other=-1)
    tl.store(inverse + rows, places.to(tl.int32), mask=(rows >= 0) & (rows < total))


@triton.jit(do_not_specialize=["total"])
def _gather_backward(d_out, inverse, d_tokens, total, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = _place(WIDTH, ROWS, COLUMNS)
    real, wide = rows < total, columns < WIDTH
    places = tl.load(inverse + rows, mask=real, other=-1).to(tl.int64)
    values = tl.load(
        d_out + places[:, None] * WIDTH + columns[None, :], mask=(places >= 0)[:, None] & wide[None, :], other=0.0
    )
    tl.store(d_tokens + rows[:, None] * WIDTH + columns[None, :], values, mask=real[:, None] & wide[None, :])


def refuses_gather_rows(tokens: Tensor, rows: Tensor) -> inputs.Obstacle | None:
    """Why `gather_rows` cannot compute these: (reason, remedy), or None."""
    obstacle = inputs.layout("tokens", tokens) or inputs.layout("rows", rows, (torch.int64,))
    if obstacle is not None:
        return obstacle
    if tokens.dim() != 2:
        return f"tokens of shape {list(tokens.shape)}, [T, D] is needed", "tokens.flatten(1)"
    if rows.dim() != 1:
        return f"rows of shape {list(rows.shape)}, a list of rows is needed", "rows.flatten()"
    if rows.device != tokens.device:
        return f"rows on {rows.device}, tokens on {tokens.device}", f"rows.to('{tokens.device}')"
    return None


def _launch(kernel: Any, tensors: tuple[Tensor, ...], counts: tuple[int, ...], written: Tensor) -> None:
    """Run a kernel over the tiles of what it writes, [rows, D]."""
    count, width = written.shape
    tiles = triton.cdiv(count, TILE[0]) * triton.cdiv(width, TILE[1])
    if tiles:
        kernel[(tiles,)](
            *tensors, written, *counts, WIDTH=width, ROWS=TILE[0], COLUMNS=TILE[1], num_warps=WARPS, num_stages=1
        )


@torch.library.custom_op("personvit::gather_rows", mutates_args=())
def _gather_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    inputs.require("gather_rows", refuses_gather_rows(tokens, rows), tokens=tokens, rows=rows)
    out = torch.empty(len(rows), tokens.shape[1], dtype=tokens.dtype, device=tokens.device)
    with torch.cuda.device_of(tokens):
        _launch(_gather_forward, (tokens, rows), (len(rows), len(tokens)), out)
    return out


@_gather_rows.register_fake
def _(tokens, rows):
    return tokens.new_empty(rows.shape[0], tokens.shape[1])


@torch.library.custom_op("personvit::gather_rows_backward", mutates_args=())
def _gather_rows_backward(d_out: Tensor, rows: Tensor, total: int) -> Tensor:
    """Gradient of all rows [total, D], 0 where not chosen; d_out is contiguous."""
    d_tokens = torch.empty(total, d_out.shape[1], dtype=d_out.dtype, device=d_out.device)
    inverse = torch.full((total,), -1, dtype=torch.int32, device=d_out.device)
    with torch.cuda.device_of(d_out):
        if len(rows):
            _gather_inverse[(triton.cdiv(len(rows), INVERSE_BLOCK),)](
                rows, inverse, len(rows), total, BLOCK=INVERSE_BLOCK, num_warps=WARPS, num_stages=1
            )
        _launch(_gather_backward, (d_out, inverse), (total,), d_tokens)
    return d_tokens


@_gather_rows_backward.register_fake
def _(d_out, rows, total):
    return d_out.new_empty(total, d_out.shape[1])


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, rows = inputs
    ctx.total = tokens.shape[0]
    ctx.save_for_backward(rows)


def _gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
    (rows,) = ctx.saved_tensors
    return torch.ops.personvit.gather_rows_backward(d_out.contiguous(), rows, ctx.total), None


_gather_rows.register_autograd(_gradient, setup_context=_context)


def gather_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """`personvit.ops.tokens.gather_rows`; contiguous tensors, any width.

    A row outside of the stream is neither read nor written: its result is NaN, it has no gradient.

    Raises:
        UnsupportedInputError: arguments that `refuses_gather_rows` names.
    """
    out: Tensor = torch.ops.personvit.gather_rows(tokens, rows)
    return out


def builds() -> list[Build]:
    """Every shipped configuration: the stream in float32, what attention gives in bfloat16 or float32."""
    found = []
    for width in (384, 768):
        for kind in ("bf16", "fp32"):
            constexprs = {"WIDTH": width, "ROWS": TILE[0], "COLUMNS": TILE[1]}
            forward = {"tokens": f"*{kind}", "chosen": "*i64", "out": f"*{kind}", "count": "i32", "total": "i32"}
            backward = {"d_out": f"*{kind}", "inverse": "*i32", "d_tokens": f"*{kind}", "total": "i32"}
            name = f"gather rows D={width} {kind}"
            found += [
                Build(f"{name} forward", _gather_forward, forward, constexprs, WARPS, 1, REGISTERS, SHARED),
                Build(f"{name} backward", _gather_backward, backward, constexprs, WARPS, 1, REGISTERS, SHARED),
            ]
    signature = {"chosen": "*i64", "inverse": "*i32", "count": "i32", "total": "i32"}
    found.append(
        Build("gather inverse map", _gather_inverse, signature, {"BLOCK": INVERSE_BLOCK}, WARPS, 1, REGISTERS, SHARED)
    )
    return found
