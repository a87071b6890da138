"""Gradient clipping of each parameter tensor on its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale each gradient whose L2 norm exceeds `limit`, in place.

    bytedance/ibot utils.py (clip_gradients): coefficient limit / (norm + 1e-6) per tensor, if below 1. No value is read
    back to the host.

    Args:
        parameters: tensors, of which those with a gradient are used.
        limit: L2 norm limit of one tensor; 0 leaves the gradients as they are.

    Returns:
        Scalar float32: L2 norm over all gradients before clipping; not finite if any gradient is not.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total, coefficients = _measure(gradients, limit)
    if coefficients is not None:
        torch._foreach_mul_(gradients, list(coefficients.unbind()))
    return total


@torch.no_grad()
def clip_coefficients(parameters: Iterable[Tensor], limit: float) -> tuple[Tensor, Tensor | None]:
    """What `clip_gradients` would scale by, for `adamw_ema_step` to fold into the update; gradients stay as they are.

    Args:
        parameters: tensors, of which those with a gradient are used.
        limit: L2 norm limit of one tensor; 0: nothing is clipped.

    Returns:
        Scalar float32, the norm that `clip_gradients` returns; [n] float32 coefficients of the n parameters with a
        gradient in their order, or None if nothing is clipped.
    """
    return _measure([parameter.grad for parameter in parameters if parameter.grad is not None], limit)


def _measure(gradients: list[Tensor], limit: float) -> tuple[Tensor, Tensor | None]:
    if not gradients:
        return torch.zeros(()), None
    norms = torch._foreach_norm(gradients)
    stacked = torch.stack([norm.float() for norm in norms])
    coefficients = (limit / (stacked + 1e-6)).clamp(max=1.0) if limit > 0 else None
    total: Tensor = torch.linalg.vector_norm(stacked)
    return total, coefficients
