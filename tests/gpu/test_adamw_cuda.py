"""The AdamW + EMA kernel on a CUDA device: a float64 oracle, repeatability, and the step that uses it."""

from __future__ import annotations

import pytest
import torch

from personvit.kernels import adamw
from personvit.ops import backend
from personvit.ops.adamw import reference
from personvit.optim import AdamWEma, clip_coefficients, clip_gradients, trained_parameters

SIZES = [(1,), (19,), (33, 31), (0,), (1023,), (4097,), (384, 1536), (100, 4096)]
CHANGED = ("parameters", "exp_avgs", "exp_avg_sqs", "averages")


def problem() -> dict:
    def tensors():
        return [torch.randn(size, device="cuda") for size in SIZES]

    averages: list[torch.Tensor | None] = [*tensors()]
    averages[1] = None
    return {
        "parameters": tensors(),
        "gradients": tensors(),
        "exp_avgs": tensors(),
        "exp_avg_sqs": [tensor.abs() for tensor in tensors()],
        "averages": averages,
        "coefficients": torch.rand(len(SIZES), device="cuda"),
        "lr": 2e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decays": [0.04, 0.0] * 4,
        "steps": [1.0, 8.0] * 4,
        "momentum": 0.996,
    }


def after(function, start: dict, dtype: torch.dtype = torch.float32, steps: int = 3) -> list[torch.Tensor]:
    def copy(value):
        if isinstance(value, torch.Tensor):
            return value.to(dtype, copy=True)
        return [copy(entry) for entry in value] if isinstance(value, list) else value

    arguments = {name: copy(value) for name, value in start.items()}
    for _ in range(steps):
        function(*arguments.values())
        arguments["steps"] = [step + 1 for step in arguments["steps"]]
    return [
        torch.cat([tensor.flatten() for tensor in arguments[name] if tensor is not None]).double() for name in CHANGED
    ]


def test_at_most_twice_as_far_off_as_torch():
    start = problem()
    results = after(reference, start, torch.float64), after(reference, start), after(adamw.adamw_ema, start)
    rounding = torch.finfo(torch.float32).eps
    for truth, theirs, mine in zip(*results, strict=True):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + rounding * truth.norm() / 4
        assert ((mine - truth).abs() <= 8 * rounding * truth.abs().clamp(min=0.25)).all()


def test_the_same_bits_every_time():
    start = problem()
    first = after(adamw.adamw_ema, start)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, after(adamw.adamw_ema, start), strict=True))


def test_calls_in_flight_do_not_disturb_each_other():
    """The table of a call must not be overwritten by the next while the device has yet to read it."""
    start = problem()
    expected = after(adamw.adamw_ema, start, steps=40)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # the host is many calls ahead
    got = after(adamw.adamw_ema, start, steps=40)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("mode", ["auto", "fused"])
def test_the_step_follows_torch(mode):
    def run(at_once: bool):
        torch.manual_seed(0)
        student = torch.nn.Sequential(torch.nn.Linear(64, 4097), torch.nn.Linear(4097, 19)).cuda()
        teacher_of = {p: p.detach().clone() for p in student.parameters()}
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.04, fused=True)
        update = AdamWEma(optimizer, teacher_of)
        for step in range(4):
            torch.manual_seed(step)
            optimizer.zero_grad()
            student(torch.randn(8, 64, device="cuda")).square().sum().backward()
            if at_once:
                update.step(clip_coefficients(trained_parameters(optimizer), 0.5)[1], 0.99)
                continue
            clip_gradients(student.parameters(), 0.5)
            optimizer.step()
            torch._foreach_lerp_(list(teacher_of.values()), list(teacher_of), 1 - 0.99)
        return [*teacher_of, *teacher_of.values(), *(state["step"] for state in optimizer.state.values())]

    before = backend.get_backend()
    backend.set_backend(mode)
    try:
        assert backend.choose("adamw_ema", "cuda") == "triton"
        for ours, theirs in zip(run(True), run(False), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    finally:
        backend.set_backend(before)
