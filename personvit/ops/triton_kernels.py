"""The Triton kernels of `kernels/`: loading, and why they cannot run."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

MODULES = ("attention", "tokens", "norm", "distill", "adamw")
MINIMUM_CAPABILITY = (8, 0)

# Modules of personvit.kernels once `load` has imported them: importing Triton takes a while and only works on Linux.
attention: ModuleType
tokens: ModuleType
norm: ModuleType
distill: ModuleType
adamw: ModuleType


@functools.cache
def load() -> str | None:
    """Import every kernel module, which registers its operators with torch. Returns why that failed, None if not."""
    for name in MODULES:
        try:
            globals()[name] = importlib.import_module(f"personvit.kernels.{name}")
        except ImportError as error:
            return f"personvit.kernels.{name} does not import: {error}"
    return None


def why_not(device: str) -> tuple[str, str] | None:
    """Why Triton kernels cannot run on this type of device, with the remedy; None if they can."""
    reason = load()
    if reason is not None:
        return reason, "pip install triton (it comes with torch's CUDA wheels, Linux)"
    from personvit.kernels.inputs import interpreted

    if device == "cpu":
        remedy = "kernels.backend=auto; to debug a kernel: TRITON_INTERPRET=1, thousands of times slower"
        return None if interpreted() else ("Triton compiles for GPUs only", remedy)
    if device != "cuda" or not torch.cuda.is_available():
        return f"there is no CUDA device ({device} was asked for)", "kernels.backend=auto"
    if interpreted():
        return "TRITON_INTERPRET is set, which runs kernels on the CPU", "unset TRITON_INTERPRET"
    capability = torch.cuda.get_device_capability()
    if capability < MINIMUM_CAPABILITY:
        needed = "{}.{}".format(*MINIMUM_CAPABILITY)
        return f"compute capability {'{}.{}'.format(*capability)}; the kernels need {needed}", "kernels.backend=auto"
    return None
