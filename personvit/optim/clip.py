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
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    stacked = torch.stack([norm.float() for norm in norms])
    if limit > 0:
        coefficients = (limit / (stacked + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(coefficients.unbind()))
    total: Tensor = torch.linalg.vector_norm(stacked)
    return total
