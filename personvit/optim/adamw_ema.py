"""The step of a torch.optim.AdamW together with clipping and the teacher's moving average, in one operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from personvit.ops import adamw_ema
from personvit.optim.ema import ema_update


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that the next step moves, those with a gradient, in the order of the optimiser's groups."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


class AdamWEma:
    """Takes the steps of an AdamW that owns the state, and lets a teacher follow.

    Afterwards parameters, teacher and `optimizer.state_dict()` are those of clipping, `optimizer.step()` and a moving
    average one after another, so the two ways may be mixed and their checkpoints exchanged. Hooks of the optimiser do
    not run.

    Args:
        optimizer: groups may differ in weight decay only; no amsgrad, maximize, capturable or differentiable.
        teacher_of: the teacher's tensor of a parameter. Parameters that do not train belong here too if the teacher
            has them: it follows whatever they hold.

    Raises:
        ValueError: another kind of AdamW.
    """

    def __init__(self, optimizer: torch.optim.AdamW, teacher_of: Mapping[Tensor, Tensor]) -> None:
        for group in optimizer.param_groups:
            used = [n for n in ("amsgrad", "maximize", "capturable", "differentiable") if group[n]]
            if used:
                raise ValueError(f"AdamWEma knows no {used[0]}: build the torch.optim.AdamW without it")
        self._optimizer = optimizer
        self._teacher_of = dict(teacher_of)
        # Bias corrections are computed on the host, while a `fused` AdamW counts its steps on the device. Reading a
        # count waits for the device; it is known here as long as nobody else has touched the tensor.
        self._counts: dict[Tensor, tuple[Tensor, int, float]] = {}

    @torch.no_grad()
    def step(self, coefficients: Tensor | None, momentum: float) -> None:
        """Clip, update, average. The gradients stay as they are.

        Args:
            coefficients: of `clip_coefficients(trained_parameters(optimizer), limit)`, [n]; None: no clipping.
            momentum: of the teacher.

        Raises:
            ValueError: groups that differ in more than weight decay; coefficients for another number of parameters.
        """
        groups = self._optimizer.param_groups
        lr, (beta1, beta2), eps = (_common(groups, name) for name in ("lr", "betas", "eps"))
        members = [(p, group) for group in groups for p in group["params"] if p.grad is not None]
        parameters = [p for p, _ in members]
        states = [self._state(p, group) for p, group in members]
        counts = [state["step"] for state in states]
        steps = [self._count(p, count) + 1 for p, count in zip(parameters, counts, strict=True)]
        adamw_ema(
            parameters,
            [p.grad for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [self._teacher_of.get(p) for p in parameters],
            coefficients,
            lr,
            beta1,
            beta2,
            eps,
            [group["weight_decay"] for _, group in members],
            steps,
            momentum,
        )
        if counts:
            torch._foreach_add_(counts, 1)
        for p, count, step in zip(parameters, counts, steps, strict=True):
            self._counts[p] = (count, count._version, step)
        self._follow_the_rest(set(parameters), momentum)

    def _follow_the_rest(self, done: set[Tensor], momentum: float) -> None:
        rest = [(teacher, p) for p, teacher in self._teacher_of.items() if p not in done]
        ema_update([teacher for teacher, _ in rest], [p for _, p in rest], momentum)

    def _state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """State of a parameter; a new one as torch.optim.Adam._init_group begins it."""
        state: dict[str, Tensor] = self._optimizer.state[parameter]
        if not state:
            where = parameter.device if group["fused"] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=where)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _count(self, parameter: Tensor, count: Tensor) -> float:
        known = self._counts.get(parameter)
        if known is not None and known[0] is count and known[1] == count._version:
            return known[2]
        return float(count)


def _common(groups: list[dict[str, Any]], name: str) -> Any:
    values = [group[name] for group in groups]
    if any(value != values[0] for value in values):
        raise ValueError(f"AdamWEma takes one {name} for all groups, got {values}")
    return values[0]
