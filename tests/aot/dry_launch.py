"""Every Triton kernel through its operator, as on an sm_90 GPU, up to the launch itself, which is left out.

python tests/aot/dry_launch.py     prints the launches by kernel, as JSON

What runs is Triton's own way from a call to a launch, with tensors of the CPU in place of the GPU's: arguments are
bound and specialised by their values, kernels compiled for what came of it, shared memory compared with the limit of
the card. The interpreter, which the other tests use, passes by all of that. Results are whatever lies in memory.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget

from personvit import ops
from personvit.config import PretrainConfig, load_config
from personvit.engine.step import PretrainStep
from personvit.kernels import inputs
from personvit.runtime.distributed import Ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_pretrain

SHARED_MEMORY = 232_448
"""Bytes that a program may have on sm_90."""
INTEGERS = {f"{sign}{bits}": (bits, sign) for sign in "iu" for bits in (8, 16, 32, 64)}

launches: collections.Counter[str] = collections.Counter()


class DryLauncher:
    """Checks what the launcher in C would refuse, and counts."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.name
        self.signature = source.signature

    def __call__(self, *launch: Any) -> None:
        grid, values = launch[:3], launch[len(launch) - len(self.signature) :]
        limits = (2**31 - 1, 65535, 65535)
        assert all(0 <= size <= limit for size, limit in zip(grid, limits, strict=True)), (self.name, grid)
        for (name, kind), value in zip(self.signature.items(), values, strict=True):
            assert kind == "constexpr" or fits(kind, value), f"{self.name}: {name}={value!r} as {kind}"
        launches[self.name] += 1


def fits(kind: str, value: Any) -> bool:
    """Whether a value can be passed as a type of Triton's."""
    if kind.startswith("*"):
        return value is None or hasattr(value, "data_ptr")
    if kind in INTEGERS:
        bits, sign = INTEGERS[kind]
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if sign == "i" else (0, 2**bits)
        return isinstance(value, int) and low <= value < high
    return isinstance(value, (int, float))


class DryUtilities:
    """Of the driver."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        assert shared <= SHARED_MEMORY, (name, shared)
        return object(), object(), 0, 0, 1024


class DryDriver:
    """Stands for a GPU of compute capability 9.0."""

    launcher_cls = DryLauncher
    utils = DryUtilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def run_step(recipe: str, images: int) -> None:
    """A step of pre-training at the real sizes of a recipe, in bf16 as it asks for."""
    case = bench_pretrain.Case(recipe, images, "cpu", ("model.drop_path=0.1",))
    step = PretrainStep(load_config(PretrainConfig, recipe), Ranks(0, 1, 0, torch.device("cpu")), steps_per_epoch=10)
    step.forward_backward(case.batch(0), 10, 0)
    step.finish(10)


def run_attention() -> None:
    """Lengths, types and head dimensions that no step has."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for length in (1, 19, 33, 65, 129, 197, 256):
            for head_dim in (32, 64, 128):
                qkv = torch.randn(length, 3, 1, head_dim).to(dtype).requires_grad_()
                ops.packed_attention(qkv, [(1, length)]).sum().backward()


def run_update(sizes: tuple[int, ...]) -> None:
    """AdamW with clipping and the teacher's moving average; a step whose numbers are no numbers would leave it out."""
    lists = [[torch.zeros(size) for size in sizes] for _ in range(4)]
    averages = [None, *(torch.zeros(size) for size in sizes[1:])]
    for coefficients in (torch.ones(len(sizes)), None):
        decays, steps = [0.04] * len(sizes), [1.0] * len(sizes)
        ops.adamw_ema(*lists, averages, coefficients, 1e-3, 0.9, 0.999, 1e-8, decays, steps, 0.996)


def main() -> None:
    """Launch all, print the counts."""
    logging.disable(logging.WARNING)
    triton.runtime.driver.set_active(DryDriver())
    inputs.interpreted = lambda: True  # tensors of the CPU are taken
    ops.set_backend("triton")
    run_step("vit_small_luperson", images=1)
    run_attention()
    run_update((1, 5, 70_000))
    print(json.dumps(launches))


if __name__ == "__main__":
    main()
