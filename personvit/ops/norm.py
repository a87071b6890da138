"""LayerNorm with what stands before it: the residual sum, and at the end of the backbone the choice of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from personvit.ops import backend, triton_kernels


def add_layer_norm(
    tokens: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a residual branch to the stream, and normalise the sum for the next branch.

    stream = tokens + scale * gamma * branch; normed = LayerNorm(stream) (Ba, Kiros, Hinton 2016), statistics in float32
    or wider, of the stream as it is rounded to its dtype. `scale` is the factor of stochastic depth (Huang et al. 2016,
    0 or 1/keep), `gamma` LayerScale (Touvron et al. 2021).

    Args:
        tokens: [T, D] residual stream, any floating dtype.
        branch: [T, D], any floating dtype; None: nothing is added, the stream is `tokens` itself.
        scale: [T] float32 factor of each row of the branch, no gradient; None: 1.
        gamma: [D] factor of each column of the branch; None: 1.
        weight: [D] of the norm.
        bias: [D] of the norm.
        eps: added to the variance.
        dtype: of `normed`; None: the dtype of autocast where that is on for this device, else that of the stream.

    Returns:
        stream [T, D] in the dtype of tokens, and normed [T, D]. Differentiable.

    Raises:
        ValueError: shapes that do not fit, or scale or gamma without a branch.
    """
    _check("add_layer_norm", tokens, branch, scale, gamma=gamma, weight=weight, bias=bias)
    if branch is None and gamma is not None:
        raise ValueError("add_layer_norm: gamma multiplies a branch, and there is none")
    dtype = dtype or _norm_dtype(tokens)
    arguments = (tokens, branch, scale, gamma, weight, bias, eps, dtype)
    stream, normed = backend.call("add_layer_norm", tokens.device.type, *arguments)
    return stream, normed


def gather_layer_norm(
    tokens: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm of chosen rows of tokens + scale * branch; no other row is computed.

    Args:
        tokens: [T, D] residual stream, any floating dtype.
        branch: [T, D], any floating dtype; None: nothing is added.
        scale: [T] float32 factor of each row of the branch, no gradient; None: 1.
        rows: [R] int64, distinct, from 0 to T - 1; R may be 0. Their values are not checked in advance: plain torch
            raises an IndexError (an assertion of the device on CUDA), the kernel gives NaN for a row that does not
            exist. Gradients of a row named twice are undefined.
        weight: [D] of the norm.
        bias: [D] of the norm.
        eps: added to the variance.
        dtype: of the result; None: the dtype of autocast where that is on for this device, else that of tokens.

    Returns:
        [R, D], in the order of `rows`. Differentiable; gradients of tokens and branch are 0 in all other rows.

    Raises:
        ValueError: shapes that do not fit, rows that are not int64, or scale without a branch.
    """
    _check("gather_layer_norm", tokens, branch, scale, weight=weight, bias=bias)
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"gather_layer_norm needs rows [R] torch.int64, got {list(rows.shape)} {rows.dtype}")
    dtype = dtype or _norm_dtype(tokens)
    arguments = (tokens, branch, scale, rows, weight, bias, eps, dtype)
    out: Tensor = backend.call("gather_layer_norm", tokens.device.type, *arguments)
    return out


def _norm_dtype(tokens: Tensor) -> torch.dtype:
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype


def _check(name: str, tokens: Tensor, branch: Tensor | None, scale: Tensor | None, **vectors: Tensor | None) -> None:
    if tokens.dim() != 2:
        raise ValueError(f"{name} needs tokens of shape [T, D], got {list(tokens.shape)}")
    if branch is not None and branch.shape != tokens.shape:
        raise ValueError(f"{name}: branch {list(branch.shape)} and tokens {list(tokens.shape)} must have one shape")
    if scale is not None and (branch is None or scale.shape != tokens.shape[:1]):
        seen = "no branch" if branch is None else f"scale {list(scale.shape)}"
        raise ValueError(f"{name}: scale [{len(tokens)}] multiplies the rows of a branch, got {seen}")
    for vector_name, vector in vectors.items():
        if vector is not None and vector.shape != tokens.shape[1:]:
            raise ValueError(f"{name}: {vector_name} {list(vector.shape)}, tokens are {tokens.shape[1]} wide")


def _add(tokens: Tensor, branch: Tensor | None, scale: Tensor | None) -> Tensor:
    if branch is None:
        return tokens
    added = tokens + branch if scale is None else torch.addcmul(tokens, branch, scale.unsqueeze(-1))
    return added.to(tokens.dtype)


def _norm(tokens: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    # Half precision rows with float32 parameters are normalised in float32; torch has no mixed form on every device.
    wide = torch.promote_types(tokens.dtype, weight.dtype)
    return F.layer_norm(tokens.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(dtype)


def _reference_add(
    tokens: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if branch is not None and gamma is not None:
        branch = branch * gamma
    stream = _add(tokens, branch, scale)
    return stream, _norm(stream, weight, bias, eps, dtype)


def _reference_gather(
    tokens: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    branch = None if branch is None else branch.index_select(0, rows)
    scale = None if scale is None else scale.index_select(0, rows)
    return _norm(_add(tokens.index_select(0, rows), branch, scale), weight, bias, eps, dtype)


backend.register(
    backend.Operator(
        "add_layer_norm",
        backend.Implementation("reference", _reference_add, ("cpu", "cuda"), "plain torch: addcmul, layer_norm"),
        (
            backend.Implementation(
                "triton",
                lambda *args: triton_kernels.norm.add_layer_norm(*args),
                ("cuda",),
                "sum and norm in one Triton kernel",
                triton_kernels.why_not,
                lambda *args: triton_kernels.norm.refuses_add_layer_norm(*args),
            ),
        ),
    )
)
backend.register(
    backend.Operator(
        "gather_layer_norm",
        backend.Implementation(
            "reference", _reference_gather, ("cpu", "cuda"), "plain torch: index_select, layer_norm"
        ),
        (
            backend.Implementation(
                "triton",
                lambda *args: triton_kernels.norm.gather_layer_norm(*args),
                ("cuda",),
                "sum, choice of rows and norm in one Triton kernel",
                triton_kernels.why_not,
                lambda *args: triton_kernels.norm.refuses_gather_layer_norm(*args),
            ),
        ),
    )
)
