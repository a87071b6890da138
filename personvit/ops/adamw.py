"""One step of AdamW, with clipping before it and the teacher's moving average after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from personvit.ops import backend, triton_kernels


@torch.no_grad()
def adamw_ema(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor | None],
    coefficients: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decays: Sequence[float],
    steps: Sequence[float],
    momentum: float,
) -> None:
    """Move parameters, moments and averages in place; the gradients stay as they are.

    For tensor i at its step t, as torch.optim.AdamW (arXiv 1711.05101, algorithm 2) and then the teacher's average
    (arXiv 2104.14294, section 3.1):

        g = coefficients[i] * gradients[i]
        p = (1 - lr * weight_decays[i]) * p
        m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
        p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
        average = momentum * average + (1 - momentum) * p

    Bytes per float32 parameter: 36 in one pass; clipping (8), AdamW (28) and averaging (12) one after another move 48.

    Args:
        parameters: n tensors of any shapes, one floating dtype, one device.
        gradients: [n] of the same shapes.
        exp_avgs: [n] first moments m.
        exp_avg_sqs: [n] second moments v.
        averages: [n] the teacher's tensors; None for a parameter that has none.
        coefficients: factor of each gradient, [n] on the device (`personvit.optim.clip_coefficients`); None: 1.
        lr: learning rate.
        beta1: decay of m.
        beta2: decay of v.
        eps: added to the denominator.
        weight_decays: [n] decoupled weight decay of each tensor.
        steps: [n] number of this step for each tensor, 1 for the first: a parameter that was frozen lags behind.
        momentum: of the averages.

    Raises:
        ValueError: lists of different lengths, tensors of different shapes, coefficients of another shape.
    """
    count = len(parameters)
    lists = {"gradients": gradients, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "averages": averages}
    for name, values in {**lists, "weight_decays": weight_decays, "steps": steps}.items():
        if len(values) != count:
            raise ValueError(f"adamw_ema: {count} parameters, but {len(values)} {name}")
    for name, tensors in lists.items():
        for index, tensor in enumerate(tensors):
            if tensor is not None and tensor.shape != parameters[index].shape:
                shapes = f"{list(tensor.shape)}, the parameter {list(parameters[index].shape)}"
                raise ValueError(f"adamw_ema: {name}[{index}] has shape {shapes}")
    if coefficients is not None and coefficients.shape != (count,):
        raise ValueError(f"adamw_ema: coefficients have shape {list(coefficients.shape)}, expected [{count}]")
    if count == 0:
        return
    arguments = (lr, beta1, beta2, eps, weight_decays, steps, momentum)
    backend.call(
        "adamw_ema",
        parameters[0].device.type,
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        averages,
        coefficients,
        *arguments,
    )


@torch.no_grad()
def reference(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor | None],
    coefficients: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decays: Sequence[float],
    steps: Sequence[float],
    momentum: float,
) -> None:
    """AdamW of torch between two foreach operations; arguments as of `adamw_ema`."""
    scaled = list(gradients)
    if coefficients is not None:
        scaled = list(torch._foreach_mul(scaled, list(coefficients.unbind())))
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    for weight_decay in dict.fromkeys(weight_decays):
        members = [index for index, decay in enumerate(weight_decays) if decay == weight_decay]
        adamw(
            [parameters[i] for i in members],
            [scaled[i] for i in members],
            [exp_avgs[i] for i in members],
            [exp_avg_sqs[i] for i in members],
            max_exp_avg_sqs=[],
            state_steps=[torch.tensor(float(steps[i]) - 1) for i in members],  # it counts this step itself
            # On a CPU torch's fused kernel takes a seventh of the time; on CUDA it would want its counts on the device.
            fused=on_cpu,
            foreach=not on_cpu,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
    followed = [(a, p) for a, p in zip(averages, parameters, strict=True) if a is not None]
    if followed:
        torch._foreach_lerp_([a for a, _ in followed], [p for _, p in followed], 1.0 - momentum)


def _triton(*arguments: Any) -> None:
    triton_kernels.adamw.adamw_ema(*arguments)


def _refuses(*arguments: Any) -> backend.Obstacle | None:
    obstacle: backend.Obstacle | None = triton_kernels.adamw.refuses(*arguments)
    return obstacle


backend.register(
    backend.Operator(
        "adamw_ema",
        backend.Implementation("reference", reference, ("cpu", "cuda"), "torch's AdamW between foreach operations"),
        (
            backend.Implementation(
                "triton",
                _triton,
                ("cuda",),
                "one pass over memory, one launch for all tensors",
                triton_kernels.why_not,
                _refuses,
            ),
        ),
    )
)
