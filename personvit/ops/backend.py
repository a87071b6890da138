"""Which implementation of an operator runs: one choice for the whole process, made visible.

An operator has a plain `reference` and any number of faster implementations, listed fastest first for each type of
device. `auto` takes the first one that can run; `fused` insists on the very first; `reference` takes the plain one;
`triton` insists on Triton kernels where an operator has one, on a CPU in Triton's interpreter (for debugging).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from personvit.errors import BackendUnavailableError, ConfigError, UnsupportedInputError

log = logging.getLogger(__name__)

MODES = ("auto", "reference", "fused", "triton")
INSISTENT = ("fused", "triton")
"""Modes in which an implementation that cannot do its work is an error."""

Obstacle = tuple[str, str]
"""(reason, remedy)."""
WhyNot = Callable[[str], "Obstacle | None"]
"""Takes a type of device; returns the obstacle where an implementation cannot run, None where it can."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator."""

    backend: str
    """reference, sdpa, native, triton, xformers."""
    function: Callable[..., Any]
    devices: tuple[str, ...]
    """Types of device that it is made for."""
    about: str
    """What it is, for the report."""
    why_not: WhyNot = lambda device: None
    refuses: Callable[..., Obstacle | None] = lambda *args: None
    """Takes the arguments of a call; returns the obstacle where it cannot compute these, None where it can."""


@dataclass(frozen=True)
class Operator:
    """An operator and its implementations, fastest first; `reference` runs everywhere."""

    name: str
    reference: Implementation
    faster: tuple[Implementation, ...]

    def candidates(self, device: str, mode: str = "auto") -> list[Implementation]:
        """The faster implementations made for a type of device, as a mode wants them."""
        if mode == "triton" and any(implementation.backend == "triton" for implementation in self.faster):
            return [implementation for implementation in self.faster if implementation.backend == "triton"]
        return [implementation for implementation in self.faster if device in implementation.devices]


class ReportRow(NamedTuple):
    """Which backend computes an operator, and why that one."""

    op: str
    backend: str
    reason: str


_operators: dict[str, Operator] = {}
_implementations: dict[tuple[str, str], Implementation] = {}
_mode = "auto"
_chosen: dict[tuple[str, str], tuple[str, ...]] = {}
_told: set[tuple[str, str, str]] = set()


def register(operator: Operator) -> None:
    """Make an operator known. Called by the modules of `personvit.ops`."""
    _operators[operator.name] = operator
    for implementation in (operator.reference, *operator.faster):
        _implementations[operator.name, implementation.backend] = implementation


def implementations(name: str) -> list[Implementation]:
    """All implementations of an operator, the reference first, whether or not they can run here."""
    operator = _operators[name]
    return [operator.reference, *operator.faster]


def call(name: str, device: str, *args: Any) -> Any:
    """Compute an operator on tensors of a type of device with the implementation chosen for it.

    Raises:
        UnsupportedInputError: the mode insists on an implementation that refuses these arguments.
    """
    for backend in _order(name, device):
        implementation = _implementations[name, backend]
        obstacle = implementation.refuses(*args)
        if obstacle is None:
            return implementation.function(*args)
        reason, remedy = obstacle
        if _mode in INSISTENT:
            raise UnsupportedInputError(
                f"kernels.backend={_mode}: the {backend} implementation of {name} cannot compute this on {device}: "
                f"{reason}. Remedy: {remedy}. Or take what fits: kernels.backend=auto"
            )
        _tell_once(name, backend, reason, remedy)
    raise AssertionError(f"{name}: the reference computes everything")


def get_backend() -> str:
    """The mode in force: auto, reference or fused."""
    return _mode


def set_backend(mode: str) -> None:
    """Set how implementations are chosen, for every operator of this process.

    Args:
        mode: `auto`, `reference`, `fused`, or `triton`.

    Raises:
        ConfigError: any other mode.
        BackendUnavailableError: `fused` or `triton`, and what they insist on cannot run on this device.
    """
    global _mode
    if mode not in MODES:
        raise ConfigError(f"kernels.backend={mode} is not one of {', '.join(MODES)}. Example: kernels.backend=auto")
    device = default_device()
    if mode in INSISTENT:
        for operator in _operators.values():
            _choose(operator, device, mode)
    _mode = mode
    _chosen.clear()
    if mode == "fused" and device == "cpu":
        rows = ", ".join(f"{row.op}: {row.backend} ({row.reason})" for row in report(device))
        log.info("No CUDA device is visible, so Triton kernels are off. On the CPU the operators run as: %s", rows)


def default_device() -> str:
    """Type of the device that runs train on here: cuda where one is visible, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose(name: str, device: str) -> str:
    """The backend that computes an operator on a type of device; logs the choice the first time.

    Raises:
        BackendUnavailableError: the mode insists on an implementation that cannot run.
    """
    backend: str = _order(name, device)[0]
    return backend


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiled function keeps the choice of its first call
def _order(name: str, device: str) -> tuple[str, ...]:
    """The chosen backend, and those that take over where it refuses an argument: none if the mode insists on it."""
    key = (name, device)
    if key not in _chosen:
        operator = _operators[name]
        implementation, reason = _choose(operator, device, _mode)
        level = logging.INFO
        if _mode == "auto" and implementation.backend == "reference" and operator.candidates(device):
            level = logging.WARNING  # slow, and not what was asked for
        log.log(level, "%s on %s: %s (%s)", name, device, implementation.backend, reason)
        others: list[Implementation] = []
        if _mode == "auto" and implementation is not operator.reference:
            candidates = operator.candidates(device)
            later = candidates[candidates.index(implementation) + 1 :]
            others = [*(other for other in later if other.why_not(device) is None), operator.reference]
        _chosen[key] = (implementation.backend, *(other.backend for other in others))
    return _chosen[key]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # said while tracing
def _tell_once(name: str, backend: str, reason: str, remedy: str) -> None:
    if (name, backend, reason) not in _told:
        _told.add((name, backend, reason))
        log.warning("%s: not %s for this call: %s; remedy: %s", name, backend, reason, remedy)


def report(device: str | None = None) -> list[ReportRow]:
    """What every operator runs on a type of device (default: the one that runs train on here), and why."""
    device = device or default_device()
    rows = []
    for name, operator in sorted(_operators.items()):
        try:
            implementation, reason = _choose(operator, device, _mode)
            rows.append(ReportRow(name, implementation.backend, reason))
        except BackendUnavailableError as error:
            rows.append(ReportRow(name, "unavailable", str(error)))
    return rows


def _choose(operator: Operator, device: str, mode: str) -> tuple[Implementation, str]:
    if mode == "reference":
        return operator.reference, f"{operator.reference.about}; kernels.backend=reference"
    obstacles: list[str] = []
    for candidate in operator.candidates(device, mode):
        obstacle = candidate.why_not(device)
        if obstacle is None:
            return candidate, "; ".join([candidate.about, *obstacles])
        reason, remedy = obstacle
        if mode in INSISTENT:
            raise BackendUnavailableError(
                f"kernels.backend={mode}: {operator.name} cannot run its {candidate.backend} implementation on "
                f"{device}: {reason}. Remedy: {remedy}. Or take what is there: kernels.backend=auto"
            )
        obstacles.append(f"not {candidate.backend}: {reason}, remedy: {remedy}")
    return operator.reference, "; ".join([operator.reference.about, *obstacles])
