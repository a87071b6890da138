"""The compiled operators of `csrc/`: loading, and the shape functions that torch needs to trace them."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = Path(__file__).resolve().parent.parent
BUILD_COMMAND = "pip install -e . --no-build-isolation"


@functools.cache
def load_cpu() -> str | None:
    """Load personvit._C (schemas and CPU operators) once. Returns why that failed, None if it did not."""
    reason = _load_library("_C.so")
    if reason is None:
        torch.library.register_fake("personvit::block_masks", _fake_block_masks)
        torch.library.register_fake("personvit::knn", _fake_knn)
    return reason


@functools.cache
def load_cuda() -> str | None:
    """Load personvit._C_cuda (CUDA operators) once, after personvit._C. Returns why that failed, None if it did not."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    return load_cpu() or _load_library("_C_cuda.so")


def why_not(device: str) -> tuple[str, str] | None:
    """Why the compiled operators cannot run on this type of device, with the remedy; None if they can."""
    if device == "cpu":
        reason = load_cpu()
        return None if reason is None else (reason, BUILD_COMMAND)
    if device == "cuda":
        reason = load_cuda()
        return None if reason is None else (reason, f"PERSONVIT_CUDA=ON {BUILD_COMMAND}")
    return f"the compiled operators know cpu and cuda, not {device}", "move the tensors to the CPU"


def block_masks(
    targets: Tensor, height: int, width: int, seed: int, first: int, log_aspect_low: float, log_aspect_high: float
) -> Tensor:
    """`personvit::block_masks`; see `personvit.ops.block_masks`."""
    masks: Tensor = torch.ops.personvit.block_masks(
        targets, height, width, seed, first, log_aspect_low, log_aspect_high
    )
    return masks


def knn(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`personvit::knn`; see `personvit.ops.knn`."""
    distances, indices = torch.ops.personvit.knn(query, gallery, k)
    return distances, indices


def _load_library(name: str) -> str | None:
    path = PACKAGE / name
    if not path.is_file():
        return f"personvit/{name} was not built"
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        # Typically a library of another torch or CUDA version: the dynamic linker names what it misses.
        return f"personvit/{name} does not load: {error}"
    return None


def _fake_block_masks(
    targets: Tensor, height: int, width: int, seed: int, first: int, log_aspect_low: float, log_aspect_high: float
) -> Tensor:
    return targets.new_empty((targets.shape[0], height, width), dtype=torch.bool)


def _fake_knn(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)
