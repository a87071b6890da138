"""Seeds: independent random streams from integers, and the state of the global generators as plain data."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

_MASK64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    """The output function of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators")."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def stream_seed(*parts: int) -> int:
    """Hash integers to a seed, so that every (seed, epoch, position, ...) has a random stream of its own.

    The order and the number of the parts matter: (1, 2), (2, 1) and (1, 2, 0) give unrelated seeds.

    Args:
        *parts: any integers; each is reduced modulo 2**64.

    Returns:
        Integer in [0, 2**63), fit for torch, numpy and a signed 64-bit operator argument.
    """
    state = _mix((len(parts) * _GOLDEN_GAMMA) & _MASK64)
    for part in parts:
        state = _mix(((state ^ (part & _MASK64)) + _GOLDEN_GAMMA) & _MASK64)
    return state >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of random, numpy and torch (CPU and every CUDA device)."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002 - the global generator is what third-party code draws from
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of the global generators as plain data that `torch.load(weights_only=True)` reads."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned. CUDA's part is skipped where this process has no CUDA device."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(  # noqa: NPY002
        (numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"])
    )
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
