"""What the kernels ask of their tensors: one line for `why_not`, the same in the error of a direct call."""

from __future__ import annotations

import torch
from torch import Tensor

from personvit.errors import UnsupportedInputError

Obstacle = tuple[str, str]
"""(reason, remedy)."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ALIGNMENT = 16
"""Bytes: kernels are compiled for pointers that are multiples of it."""


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def layout(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Obstacle | None:
    """Refuse a tensor of another type, on another kind of device, not contiguous, or misaligned."""
    if tensor.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"{name} is {tensor.dtype}, the kernel takes {known}", f"{name}.to(...) one of these"
    if tensor.device.type != ("cpu" if interpreted() else "cuda"):
        where = "Triton's interpreter reads the CPU" if interpreted() else "the kernel runs on CUDA devices"
        return f"{name} is on {tensor.device}, {where}", "move it there, or kernels.backend=auto"
    if not tensor.is_contiguous():
        return f"{name} of shape {list(tensor.shape)} has strides {list(tensor.stride())}", f"{name}.contiguous()"
    # A trace knows no offsets; what it inlines into is checked again when the operator runs.
    if not torch.compiler.is_compiling() and tensor.storage_offset() * tensor.element_size() % ALIGNMENT:
        return f"{name} does not start at a multiple of {ALIGNMENT} bytes", f"{name}.clone()"
    return None


def same_type(**tensors: Tensor) -> Obstacle | None:
    """Refuse tensors that differ in type or device."""
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
    if len(kinds) > 1:
        seen = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items())
        return f"mixed types or devices: {seen}", "convert all to one with .to()"
    return None


def require(operator: str, obstacle: Obstacle | None, **tensors: Tensor) -> None:
    """Raise what `refuses` of a kernel found.

    Raises:
        UnsupportedInputError: names operator, obstacle, shapes, types, devices and the remedy.
    """
    if obstacle is not None:
        seen = ", ".join(f"{name} {list(t.shape)} {t.dtype} on {t.device}" for name, t in tensors.items())
        raise UnsupportedInputError(f"{operator}: {obstacle[0]}. Got {seen}. Remedy: {obstacle[1]}")
