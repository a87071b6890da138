"""LayerNorm with the residual sum before it."""

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
    _check(tokens, branch, scale, gamma=gamma, weight=weight, bias=bias)
    device = tokens.device.type
    if dtype is None:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
    arguments = (tokens, branch, scale, gamma, weight, bias, eps, dtype)
    stream, normed = backend.call("add_layer_norm", device, *arguments)
    return stream, normed


def _check(tokens: Tensor, branch: Tensor | None, scale: Tensor | None, **vectors: Tensor | None) -> None:
    if tokens.dim() != 2:
        raise ValueError(f"add_layer_norm needs tokens of shape [T, D], got {list(tokens.shape)}")
    if branch is not None and branch.shape != tokens.shape:
        raise ValueError(
            f"add_layer_norm: branch {list(branch.shape)} and tokens {list(tokens.shape)} must have one shape"
        )
    if scale is not None and (branch is None or scale.shape != tokens.shape[:1]):
        seen = "no branch" if branch is None else f"scale {list(scale.shape)}"
        raise ValueError(f"add_layer_norm: scale [{len(tokens)}] multiplies the rows of a branch, got {seen}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != tokens.shape[1:]:
            raise ValueError(f"add_layer_norm: {name} {list(vector.shape)}, tokens are {tokens.shape[1]} wide")
    if branch is None and vectors["gamma"] is not None:
        raise ValueError("add_layer_norm: gamma multiplies a branch, and there is none")


def _reference(
    tokens: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    stream = tokens
    if branch is not None:
        added = branch if gamma is None else branch * gamma
        added = tokens + added if scale is None else torch.addcmul(tokens, added, scale.unsqueeze(-1))
        stream = added.to(tokens.dtype)
    # Half precision rows with float32 parameters are normalised in float32; torch has no mixed form on every device.
    wide = torch.promote_types(stream.dtype, weight.dtype)
    normed = F.layer_norm(stream.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return stream, normed.to(dtype)


backend.register(
    backend.Operator(
        "add_layer_norm",
        backend.Implementation("reference", _reference, ("cpu", "cuda"), "plain torch: addcmul, layer_norm"),
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
