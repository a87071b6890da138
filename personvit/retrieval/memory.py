"""How much memory is free for a result."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not say.

    On the CPU it is the smaller of what the machine has left and what the container may still take.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    candidates = [_machine(), *(_container(*group) for group in _CGROUPS)]
    return min((value for value in candidates if value is not None), default=None)


def _machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return None
    except OSError:  # no Linux
        names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else None


def _container(folder: Path, limit: str, usage: str, files: str) -> int | None:
    """Limit less usage, where files that the system merely keeps in memory do not count as used."""
    try:
        allowed = (folder / limit).read_text(encoding="ascii").strip()
        if allowed == "max":
            return None
        used = int((folder / usage).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, int(allowed) - used + int(stat.get(files, 0)))
    except (OSError, ValueError):
        return None


def format_bytes(count: float) -> str:
    """As MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
