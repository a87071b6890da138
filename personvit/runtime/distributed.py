"""Ranks: one process without a launcher, several under `torchrun`.

Library code calls `world_size`, `all_reduce_sum` and `is_main` without asking whether a process group exists: with one
process they return 1, the tensor itself, and True.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from personvit.errors import ConfigError, PersonViTError

_TIMEOUT = timedelta(minutes=30)  # a rank may wait for rank 0 to render the generated persons or to run the probe


@dataclass(frozen=True)
class Ranks:
    """Place of this process among its peers.

    Attributes:
        rank: index of this process, 0 to world_size - 1.
        world_size: number of processes.
        local_rank: index among the processes of this machine.
        device: where this process computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0


def init_distributed() -> Ranks:
    """Join the process group described by torchrun's environment, NCCL on CUDA and gloo on CPU.

    Without `WORLD_SIZE` in the environment (no launcher) no process group is made.

    Raises:
        ConfigError: more ranks on this machine than CUDA devices, or several ranks without a launcher.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE={size} is set, but MASTER_ADDR is not, so the ranks cannot find each other. Start them with "
            f"torchrun --nproc-per-node {size} -m personvit.pretrain ..., or unset WORLD_SIZE for one process."
        )
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local_rank)
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=_TIMEOUT)
    return Ranks(rank=rank, world_size=size, local_rank=local_rank, device=device)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} has no CUDA device: this machine shows {count}. "
            f"Start torchrun with --nproc-per-node {count}, or widen CUDA_VISIBLE_DEVICES."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks in place and return it; no gradient flows. One rank: the tensor as it is."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on at least one rank. Every rank must call it and gets the same answer."""
    if not dist.is_initialized():
        return flag
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)).item() > 0)


def on_main(action: Callable[[], None], device: torch.device) -> None:
    """Run `action` on rank 0 while the others wait for its end; if it fails, every rank stops.

    Raises:
        PersonViTError: on rank 0, what the action raised.
        SystemExit: on the other ranks, quietly: rank 0 explains.
    """
    failure: PersonViTError | None = None
    if is_main():
        try:
            action()
        except PersonViTError as error:
            failure = error
    if any_rank(failure is not None, device):
        raise failure if failure is not None else SystemExit(1)


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
