"""The last LayerNorm on chosen rows only: residual sum, choice of rows and norm in one pass.

The forward reads the chosen rows and nothing else. The backward writes the dense gradient of all rows once, through an
inverse map (row -> place among the chosen, or -1), so that nothing is filled with zeros first and no sum is atomic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from personvit.kernels import inputs
from personvit.kernels.aot import Build
from personvit.kernels.rows import (
    BACKWARD_REGISTERS,
    FORWARD_REGISTERS,
    WARPS,
    programs_of,
    pull_back,
    refuses,
    row_build,
    statistics,
    sum_partials,
    tile_of,
    warps_of,
)

SCATTER_BLOCK = 1024


@triton.jit(do_not_specialize=["count", "total"])
def _gather_norm_forward(
    tokens, branch, scale, chosen, weight, bias, stream, normed, means, rstds, count, total, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    real, wide = places < count, columns < WIDTH
    rows = tl.load(chosen + places, mask=real, other=-1)
    known = (rows >= 0) & (rows < total)
    inside = known[:, None] & wide[None, :]
    offsets = rows[:, None] * WIDTH + columns[None, :]
    x = tl.load(tokens + offsets, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        addend = tl.load(branch + offsets, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            addend *= tl.load(scale + rows, mask=known, other=0.0)[:, None]
        x += addend
    rounded = x.to(stream.dtype.element_ty)
    x = rounded.to(tl.float32)
    mean, rstd = statistics(x, inside, eps, WIDTH)
    w = tl.load(weight + columns, mask=wide, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=wide, other=0.0).to(tl.float32)
    y = (x - mean[:, None]) * rstd[:, None] * w[None, :] + b[None, :]
    y = tl.where(known[:, None], y, float("nan"))  # a row that does not exist shall be seen
    written = real[:, None] & wide[None, :]
    packed = places[:, None] * WIDTH + columns[None, :]
    tl.store(stream + packed, rounded, mask=written)
    tl.store(normed + packed, y.to(normed.dtype.element_ty), mask=written)
    tl.store(means + places, mean, mask=real)
    tl.store(rstds + places, rstd, mask=real)


@triton.jit(do_not_specialize=["count", "total"])
def _gather_inverse(chosen, inverse, count, total, BLOCK: tl.constexpr):
    """inverse[chosen[i]] = i."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(chosen + places, mask=places < count, other=-1)
    tl.store(inverse + rows, places.to(tl.int32), mask=(rows >= 0) & (rows < total))


@triton.jit(do_not_specialize=["total", "steps"])
def _gather_norm_backward(
    d_normed, stream, inverse, scale, weight, means, rstds, d_tokens, d_branch, partials, total, steps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lanes, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    offsets = lanes[:, None] * WIDTH + columns[None, :]
    wide = columns < WIDTH
    w = tl.load(weight + columns, mask=wide, other=0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    d_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(steps):
        first = (step * programs + program) * ROWS
        at = first * WIDTH
        real = first + lanes < total
        places = tl.load(inverse + first + lanes, mask=real, other=-1).to(tl.int64)
        known = places >= 0
        inside = known[:, None] & wide[None, :]
        packed = places[:, None] * WIDTH + columns[None, :]
        mean = tl.load(means + places, mask=known, other=0.0)
        rstd = tl.load(rstds + places, mask=known, other=0.0)
        x = tl.load(stream + packed, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(d_normed + packed, mask=inside, other=0.0).to(tl.float32)
        x_hat = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        d_weight += dy * x_hat
        d_bias += dy
        dx = pull_back(dy * w, x_hat, rstd, WIDTH)  # 0 in rows that were not chosen
        written = real[:, None] & wide[None, :]
        tl.store(d_tokens + at + offsets, dx.to(d_tokens.dtype.element_ty), mask=written)
        if d_branch is not None:
            if scale is not None:
                # Not read where not chosen: a factor there may be anything, its gradient is 0.
                dx *= tl.load(scale + first + lanes, mask=known, other=0.0)[:, None]
            tl.store(d_branch + at + offsets, dx.to(d_branch.dtype.element_ty), mask=written)
    slots = partials + program * WIDTH + columns
    tl.store(slots, tl.sum(d_weight, 0), mask=wide)
    tl.store(slots + programs.to(tl.int64) * WIDTH, tl.sum(d_bias, 0), mask=wide)


def refuses_gather_layer_norm(
    tokens: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> inputs.Obstacle | None:
    """Why `gather_layer_norm` cannot compute these: (reason, remedy), or None."""
    obstacle = refuses(tokens, branch, scale, dtype, weight=weight, bias=bias)
    obstacle = obstacle or inputs.layout("rows", rows, (torch.int64,))
    if obstacle is None and rows.dim() != 1:
        return f"rows of shape {list(rows.shape)}, a list of rows is needed", "rows.flatten()"
    if obstacle is None and rows.device != tokens.device:
        return f"rows on {rows.device}, tokens on {tokens.device}", f"rows.to('{tokens.device}')"
    return obstacle


def _gather_outputs(tokens: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (rows.shape[0], tokens.shape[1])
    normed = torch.empty(shape, dtype=dtype, device=tokens.device)
    stream = torch.empty(shape, dtype=tokens.dtype, device=tokens.device)
    means, rstds = (torch.empty(shape[0], device=tokens.device) for _ in range(2))
    return normed, stream, means, rstds


@torch.library.custom_op("personvit::gather_layer_norm", mutates_args=())
def _gather_layer_norm(
    tokens: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normed rows, and for the backward: the rows before the norm, their means and 1 / standard deviations."""
    obstacle = refuses_gather_layer_norm(tokens, branch, scale, rows, weight, bias, eps, dtype)
    inputs.require("gather_layer_norm", obstacle, tokens=tokens, rows=rows, weight=weight, bias=bias)
    normed, stream, means, rstds = outputs = _gather_outputs(tokens, rows, dtype)
    count, (total, width) = len(rows), tokens.shape
    if count:
        tile = tile_of(width)
        with torch.cuda.device_of(tokens):
            _gather_norm_forward[(triton.cdiv(count, tile["ROWS"]),)](
                tokens, branch, scale, rows, weight, bias, stream, normed, means, rstds, count, total, eps,
                **tile, num_warps=warps_of(tile), num_stages=1,
            )  # fmt: skip
    return outputs


@_gather_layer_norm.register_fake
def _(tokens, branch, scale, rows, weight, bias, eps, dtype):
    return _gather_outputs(tokens, rows, dtype)


def _gather_gradients(total: int, stream: Tensor, branch_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    shape = (total, stream.shape[1])
    d_tokens = torch.empty(shape, dtype=stream.dtype, device=stream.device)
    d_branch = torch.empty(
        shape if branch_dtype is not None else (0,), dtype=branch_dtype or stream.dtype, device=stream.device
    )
    return d_tokens, d_branch, torch.empty(2, shape[1], device=stream.device)


@torch.library.custom_op("personvit::gather_layer_norm_backward", mutates_args=())
def _gather_layer_norm_backward(
    d_normed: Tensor,
    stream: Tensor,
    rows: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    means: Tensor,
    rstds: Tensor,
    total: int,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients: d tokens [total, D]; d branch if `branch_dtype` says so; [d weight, d bias] float32."""
    d_tokens, d_branch, _ = _gather_gradients(total, stream, branch_dtype)
    count, width = stream.shape
    if not total:
        return d_tokens, d_branch, torch.zeros(2, width, device=stream.device)
    tile = tile_of(width)
    programs, steps = programs_of(total, tile)
    inverse = torch.full((total,), -1, dtype=torch.int32, device=stream.device)
    partials = torch.empty(2, programs, width, device=stream.device)
    with torch.cuda.device_of(stream):
        if count:
            _gather_inverse[(triton.cdiv(count, SCATTER_BLOCK),)](
                rows, inverse, count, total, BLOCK=SCATTER_BLOCK, num_warps=WARPS, num_stages=1
            )
        _gather_norm_backward[(programs,)](
            d_normed, stream, inverse, scale, weight, means, rstds,
            d_tokens, None if branch_dtype is None else d_branch, partials, total, steps,
            **tile, num_warps=warps_of(tile), num_stages=1,
        )  # fmt: skip
    return d_tokens, d_branch, sum_partials(partials)


@_gather_layer_norm_backward.register_fake
def _(d_normed, stream, rows, scale, weight, means, rstds, total, branch_dtype):
    return _gather_gradients(total, stream, branch_dtype)


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, branch, scale, rows, weight, bias, _, dtype = inputs
    _, stream, means, rstds = output
    ctx.set_materialize_grads(False)
    ctx.added = branch is not None
    same = branch is None or (scale is None and branch.dtype == tokens.dtype)
    ctx.branch_dtype = None if same else branch.dtype
    ctx.total, ctx.dtypes = tokens.shape[0], (dtype, bias.dtype)
    # The few rows before the norm are kept, so that the branch of all tokens need not be.
    ctx.save_for_backward(stream, rows, scale, weight, means, rstds)


def _gather_gradient(ctx: Any, d_normed: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    stream, rows, scale, weight, means, rstds = ctx.saved_tensors
    dtype, bias_dtype = ctx.dtypes
    d_normed = torch.zeros_like(stream, dtype=dtype) if d_normed is None else d_normed.contiguous()
    d_tokens, d_branch, vectors = torch.ops.personvit.gather_layer_norm_backward(
        d_normed, stream, rows, scale, weight, means, rstds, ctx.total, ctx.branch_dtype
    )
    if ctx.branch_dtype is None:
        d_branch = d_tokens if ctx.added else None
    d_weight, d_bias = vectors[0].to(weight.dtype), vectors[1].to(bias_dtype)
    return d_tokens, d_branch, None, None, d_weight, d_bias, None, None


_gather_layer_norm.register_autograd(_gather_gradient, setup_context=_gather_context)


def gather_layer_norm(
    tokens: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """`personvit.ops.norm.gather_layer_norm` in one kernel; contiguous tensors, D up to `rows.MAX_WIDTH`.

    A row outside of the stream is neither read nor written: its result is NaN, it has no gradient.

    Raises:
        UnsupportedInputError: arguments that `refuses_gather_layer_norm` names.
    """
    out: Tensor = torch.ops.personvit.gather_layer_norm(tokens, branch, scale, rows, weight, bias, eps, dtype)[0]
    return out


def builds() -> list[Build]:
    """Every shipped configuration, residual stream in float32."""
    found = []
    for width in (384, 768):
        for kind, low in (("bf16 branch, fp32 stream", "bf16"), ("fp32", "fp32")):
            both = {
                "scale": "*fp32", "weight": "*fp32", "stream": "*fp32", "means": "*fp32", "rstds": "*fp32",
                "total": "i32",
            }  # fmt: skip
            forward = {
                "tokens": "*fp32", "branch": f"*{low}", "chosen": "*i64", "bias": "*fp32", "normed": f"*{low}",
                "count": "i32", "eps": "fp32", **both,
            }  # fmt: skip
            backward = {
                "d_normed": f"*{low}", "inverse": "*i32", "d_tokens": "*fp32", "d_branch": f"*{low}",
                "partials": "*fp32", "steps": "i32", **both,
            }  # fmt: skip
            gather = f"gather norm D={width} {kind}"
            found += [
                row_build(f"{gather} forward", _gather_norm_forward, forward, width, FORWARD_REGISTERS),
                row_build(f"{gather} backward", _gather_norm_backward, backward, width, BACKWARD_REGISTERS),
            ]
    signature = {"chosen": "*i64", "inverse": "*i32", "count": "i32", "total": "i32"}
    constexprs = {"BLOCK": SCATTER_BLOCK}
    found.append(Build("gather inverse map", _gather_inverse, signature, constexprs, WARPS, 1, 40, 4096))
    return found
