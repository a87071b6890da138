"""LayerNorm fused with the residual sum before it: drop path factor, LayerScale, sum and norm in one pass.

Bound by memory: a tile holds whole rows in registers, so that statistics cost no second pass. The backward sums
gradients of the parameters in two stages of fixed order: a number of programs that the shape decides each add up the
rows of their tiles, then `sum_partials` adds up the programs. No schedule changes a bit of the result.
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
    MAX_WIDTH,
    programs_of,
    pull_back,
    row_build,
    statistics,
    sum_builds,
    sum_partials,
    tile_of,
    warps_of,
)


@triton.jit(do_not_specialize=["count"])
def _add_norm_forward(
    tokens, branch, scale, gamma, weight, bias, stream, normed, means, rstds, count, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # Only the first row of a tile needs 64 bits.
    first = tl.program_id(0).to(tl.int64) * ROWS
    lanes, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real, wide = first + lanes < count, columns < WIDTH
    inside = real[:, None] & wide[None, :]
    at, offsets = first * WIDTH, lanes[:, None] * WIDTH + columns[None, :]
    x = tl.load(tokens + at + offsets, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        addend = tl.load(branch + at + offsets, mask=inside, other=0.0).to(tl.float32)
        if gamma is not None:
            addend *= tl.load(gamma + columns, mask=wide, other=0.0).to(tl.float32)[None, :]
        if scale is not None:
            addend *= tl.load(scale + first + lanes, mask=real, other=0.0)[:, None]
        # What the backward finds in memory is what is normalised here.
        rounded = (x + addend).to(stream.dtype.element_ty)
        tl.store(stream + at + offsets, rounded, mask=inside)
        x = rounded.to(tl.float32)
    mean, rstd = statistics(x, inside, eps, WIDTH)
    w = tl.load(weight + columns, mask=wide, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=wide, other=0.0).to(tl.float32)
    y = (x - mean[:, None]) * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(normed + at + offsets, y.to(normed.dtype.element_ty), mask=inside)
    tl.store(means + first + lanes, mean, mask=real)
    tl.store(rstds + first + lanes, rstd, mask=real)


@triton.jit(do_not_specialize=["count", "steps"])
def _add_norm_backward(
    d_stream, d_normed, stream, branch, scale, gamma, weight, means, rstds, d_tokens, d_branch, partials, count, steps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lanes, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    offsets = lanes[:, None] * WIDTH + columns[None, :]
    wide = columns < WIDTH
    w = tl.load(weight + columns, mask=wide, other=0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    d_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    if gamma is not None:
        g = tl.load(gamma + columns, mask=wide, other=0.0).to(tl.float32)[None, :]
        d_gamma = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(steps):
        first = (step * programs + program) * ROWS
        at = first * WIDTH
        real = first + lanes < count
        inside = real[:, None] & wide[None, :]
        mean = tl.load(means + first + lanes, mask=real, other=0.0)
        rstd = tl.load(rstds + first + lanes, mask=real, other=0.0)
        x = tl.load(stream + at + offsets, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(d_normed + at + offsets, mask=inside, other=0.0).to(tl.float32)
        x_hat = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        d_weight += dy * x_hat
        d_bias += dy
        dx = pull_back(dy * w, x_hat, rstd, WIDTH)
        if d_stream is not None:
            dx += tl.load(d_stream + at + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_tokens + at + offsets, dx.to(d_tokens.dtype.element_ty), mask=inside)
        if scale is not None:
            dx *= tl.load(scale + first + lanes, mask=real, other=0.0)[:, None]
        if gamma is not None:
            addend = tl.load(branch + at + offsets, mask=inside, other=0.0).to(tl.float32)
            d_gamma += tl.where(inside, dx * addend, 0.0)
            dx *= g
        if d_branch is not None:
            tl.store(d_branch + at + offsets, dx.to(d_branch.dtype.element_ty), mask=inside)
    slots = partials + program * WIDTH + columns
    kind = programs.to(tl.int64) * WIDTH
    tl.store(slots, tl.sum(d_weight, 0), mask=wide)
    tl.store(slots + kind, tl.sum(d_bias, 0), mask=wide)
    if gamma is not None:
        tl.store(slots + 2 * kind, tl.sum(d_gamma, 0), mask=wide)


def refuses_add_layer_norm(
    tokens: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> inputs.Obstacle | None:
    """Why `add_layer_norm` cannot compute these: (reason, remedy), or None."""
    vectors = {"gamma": gamma, "weight": weight, "bias": bias}
    given = {"tokens": tokens, "branch": branch, **vectors}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in tensors.items():
        obstacle = inputs.layout(name, tensor)
        if obstacle is not None:
            return obstacle
    if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= MAX_WIDTH:
        return f"tokens of shape {list(tokens.shape)}: [T, D], D from 1 to {MAX_WIDTH}", "kernels.backend=auto"
    if branch is not None and branch.shape != tokens.shape:
        return f"branch of shape {list(branch.shape)}, tokens {list(tokens.shape)}", "pass equal shapes"
    for name, vector in vectors.items():
        if vector is not None and vector.shape != tokens.shape[1:]:
            return f"{name} of shape {list(vector.shape)}, tokens are {tokens.shape[1]} wide", f"{name}.flatten()"
    if scale is not None:
        if branch is None:
            return "scale multiplies a branch, and there is none", "pass scale=None"
        # A view of the factors of all blocks, which starts anywhere: no alignment is asked of it.
        if scale.dtype != torch.float32 or not scale.is_contiguous() or scale.shape != tokens.shape[:1]:
            seen = f"scale {list(scale.shape)} {scale.dtype} with strides {list(scale.stride())}"
            return seen, f"contiguous [{tokens.shape[0]}] float32"
        tensors["scale"] = scale
    if dtype not in inputs.FLOATS:
        return f"{dtype} was asked for, the kernel writes {', '.join(map(str, inputs.FLOATS))}", "one of these"
    if len({tensor.device for tensor in tensors.values()}) > 1:
        return "tensors on several devices", "move all to one with .to()"
    return None


def _add_outputs(tokens: Tensor, branch: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Without a branch the stream is `tokens` itself, and an operator must not return its argument.
    stream = torch.empty(tokens.shape if branch is not None else (0,), dtype=tokens.dtype, device=tokens.device)
    normed = torch.empty(tokens.shape, dtype=dtype, device=tokens.device)
    means, rstds = (torch.empty(tokens.shape[0], device=tokens.device) for _ in range(2))
    return stream, normed, means, rstds


@torch.library.custom_op("personvit::add_layer_norm", mutates_args=())
def _add_layer_norm(
    tokens: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    obstacle = refuses_add_layer_norm(tokens, branch, scale, gamma, weight, bias, eps, dtype)
    inputs.require("add_layer_norm", obstacle, tokens=tokens, weight=weight, bias=bias)
    stream, normed, means, rstds = outputs = _add_outputs(tokens, branch, dtype)
    count, width = tokens.shape
    if count:
        tile = tile_of(width)
        with torch.cuda.device_of(tokens):
            _add_norm_forward[(triton.cdiv(count, tile["ROWS"]),)](
                tokens, branch, scale, gamma, weight, bias, stream, normed, means, rstds, count, eps,
                **tile, num_warps=warps_of(tile), num_stages=1,
            )  # fmt: skip
    return outputs


@_add_layer_norm.register_fake
def _(tokens, branch, scale, gamma, weight, bias, eps, dtype):
    return _add_outputs(tokens, branch, dtype)


def _add_gradients(tokens: Tensor, kinds: int, branch_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    d_tokens = torch.empty_like(tokens)
    # Where the branch has the gradient of tokens, it is written once.
    shape = tokens.shape if branch_dtype is not None else (0,)
    d_branch = torch.empty(shape, dtype=branch_dtype or tokens.dtype, device=tokens.device)
    return d_tokens, d_branch, torch.empty(kinds, tokens.shape[1], device=tokens.device)


@torch.library.custom_op("personvit::add_layer_norm_backward", mutates_args=())
def _add_layer_norm_backward(
    d_stream: Tensor | None,
    d_normed: Tensor,
    stream: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    means: Tensor,
    rstds: Tensor,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients: d tokens; d branch if `branch_dtype` says so; [d weight, d bias(, d gamma)] float32."""
    kinds = 2 if gamma is None else 3
    d_tokens, d_branch, _ = _add_gradients(stream, 0, branch_dtype)
    count, width = stream.shape
    if not count:
        return d_tokens, d_branch, torch.zeros(kinds, width, device=stream.device)
    tile = tile_of(width)
    programs, steps = programs_of(count, tile)
    partials = torch.empty(kinds, programs, width, device=stream.device)
    with torch.cuda.device_of(stream):
        _add_norm_backward[(programs,)](
            d_stream, d_normed, stream, branch, scale, gamma, weight, means, rstds,
            d_tokens, None if branch_dtype is None else d_branch, partials, count, steps,
            **tile, num_warps=warps_of(tile), num_stages=1,
        )  # fmt: skip
    return d_tokens, d_branch, sum_partials(partials)


@_add_layer_norm_backward.register_fake
def _(d_stream, d_normed, stream, branch, scale, gamma, weight, means, rstds, branch_dtype):
    return _add_gradients(stream, 2 if gamma is None else 3, branch_dtype)


def _add_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, branch, scale, gamma, weight, bias, _, dtype = inputs
    stream, _, means, rstds = output
    ctx.set_materialize_grads(False)
    ctx.added = branch is not None
    # None: d branch is d tokens.
    same = branch is None or (scale is None and gamma is None and branch.dtype == tokens.dtype)
    ctx.branch_dtype = None if same else branch.dtype
    ctx.dtypes = (dtype, bias.dtype)
    ctx.save_for_backward(
        stream if ctx.added else tokens, branch if gamma is not None else None, scale, gamma, weight, means, rstds
    )


def _add_gradient(ctx: Any, d_stream: Tensor | None, d_normed: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    stream, branch, scale, gamma, weight, means, rstds = ctx.saved_tensors
    dtype, bias_dtype = ctx.dtypes
    d_normed = torch.zeros_like(stream, dtype=dtype) if d_normed is None else d_normed.contiguous()
    d_stream = d_stream.contiguous() if ctx.added and d_stream is not None else None
    gamma = gamma if ctx.added else None
    d_tokens, d_branch, vectors = torch.ops.personvit.add_layer_norm_backward(
        d_stream, d_normed, stream, branch, scale, gamma, weight, means, rstds, ctx.branch_dtype
    )
    if ctx.branch_dtype is None:
        d_branch = d_tokens if ctx.added else None
    d_gamma = vectors[2].to(gamma.dtype) if gamma is not None else None
    d_weight, d_bias = vectors[0].to(weight.dtype), vectors[1].to(bias_dtype)
    return d_tokens, d_branch, None, d_gamma, d_weight, d_bias, None, None


_add_layer_norm.register_autograd(_add_gradient, setup_context=_add_context)


def add_layer_norm(
    tokens: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`personvit.ops.norm.add_layer_norm` in one kernel; contiguous tensors, D up to `rows.MAX_WIDTH`.

    Raises:
        UnsupportedInputError: arguments that `refuses_add_layer_norm` names.
    """
    stream, normed, _, _ = torch.ops.personvit.add_layer_norm(tokens, branch, scale, gamma, weight, bias, eps, dtype)
    return tokens if branch is None else stream, normed


def builds() -> list[Build]:
    """Every shipped configuration of the norms, residual stream in float32."""
    found = sum_builds()
    for width in (384, 768):
        for kind, low in (("bf16 branch, fp32 stream", "bf16"), ("fp32", "fp32")):
            both = {
                "branch": f"*{low}", "scale": "*fp32", "gamma": "*fp32", "weight": "*fp32", "stream": "*fp32",
                "means": "*fp32", "rstds": "*fp32", "count": "i32",
            }  # fmt: skip
            forward = {"tokens": "*fp32", "bias": "*fp32", "normed": f"*{low}", "eps": "fp32", **both}
            backward = {
                "d_stream": "*fp32", "d_normed": f"*{low}", "d_tokens": "*fp32", "d_branch": f"*{low}",
                "partials": "*fp32", "steps": "i32", **both,
            }  # fmt: skip
            add = f"add norm D={width} {kind}"
            found += [
                row_build(f"{add} forward", _add_norm_forward, forward, width, FORWARD_REGISTERS),
                row_build(f"{add} forward, no gamma", _add_norm_forward, forward, width, FORWARD_REGISTERS, "gamma"),
                row_build(f"{add} backward", _add_norm_backward, backward, width, BACKWARD_REGISTERS),
                row_build(
                    f"{add} backward, no gamma", _add_norm_backward, backward, width, BACKWARD_REGISTERS, "gamma branch"
                ),
            ]
    return found
