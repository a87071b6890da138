"""Distillation kernels on CUDA, compiled: bfloat16 as in training, sizes of training, streams, memory past 31 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from personvit import ops
from personvit.kernels import distill
from personvit.losses import DINOLoss, IBOTPatchLoss
from personvit.ops import backend
from personvit.ops.distill import _reference

DRAWS = 4


def arguments(
    images: int, views: int, crops: int, width: int, dtype: torch.dtype = torch.bfloat16, spread: float = 1.0
) -> tuple[Any, ...]:
    """CLS logits, or with one view those of patches with their weights."""
    student = (spread * torch.randn(images * views, width, device="cuda")).to(dtype)
    teacher = (spread * torch.randn(images * crops, width, device="cuda")).to(dtype)
    weights = torch.rand(images, device="cuda") if views == 1 else None
    return student, teacher, torch.randn(width, device="cuda"), 0.1, 0.04, images, views > 1, weights


def run(function: Callable[..., Any], given: tuple[Any, ...]) -> dict[str, Tensor]:
    student = given[0].detach().requires_grad_()
    loss, column_sum = function(student, *given[1:])
    (gradient,) = torch.autograd.grad(0.7 * loss, student)
    return {"loss": loss.detach(), "column_sum": column_sum, "gradient": gradient}


def compare(*draws: tuple[Any, ...]) -> None:
    """Over some draws of arguments, results and gradients err at most twice as much as plain torch's.

    Several, because a loss is one number, and plain torch's rounding may hit its true value by chance.
    """
    ours = [run(distill.distill_cross_entropy, given) for given in draws]
    theirs = [run(_reference, given) for given in draws]
    exact = [run(_reference, tuple(a.double() if isinstance(a, Tensor) else a for a in given)) for given in draws]
    for name in exact[0]:
        mine, other, truth = (
            torch.cat([found[name].double().flatten() for found in runs]) for runs in (ours, theirs, exact)
        )
        assert ours[0][name].dtype == theirs[0][name].dtype
        rounding = torch.finfo(ours[0][name].dtype).eps / (2 if name == "loss" else 4)
        assert (mine - truth).norm() <= 2 * (other - truth).norm() + rounding * truth.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("images", "views", "crops", "width"),
    [
        (16, 10, 2, 65536),
        (16, 10, 2, 8192),
        (700, 1, 1, 8192),
        (5, 4, 3, 5000),
        (3, 3, 2, 1000),
        (3, 2, 1, 1),
        (1, 2, 2, 65537),
    ],
)
def test_against_float64(images: int, views: int, crops: int, width: int, dtype: torch.dtype) -> None:
    compare(*(arguments(images, views, crops, width, dtype) for _ in range(DRAWS)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("views", [1, 10])
def test_large_logits(views: int, dtype: torch.dtype) -> None:
    draws = [arguments(4, views, min(views, 2), 8192, dtype, spread=1e4) for _ in range(DRAWS)]
    assert all(value.isfinite().all() for value in run(distill.distill_cross_entropy, draws[0]).values())
    compare(*draws)


@pytest.mark.parametrize("shape", [(128, 10, 2, 65536), (4900, 1, 1, 8192)])
def test_two_runs_agree_in_every_bit(shape: tuple[int, int, int, int]) -> None:
    given = arguments(*shape)
    first = run(distill.distill_cross_entropy, given)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second = run(distill.distill_cross_entropy, given)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_beyond_31_bits() -> None:
    width, rows = 65536, 32768 + 8
    student = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    teacher = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    student[-8:] = torch.randn(8, width, device="cuda")
    teacher[-8:] = torch.randn(8, width, device="cuda")
    weights = torch.zeros(rows, device="cuda")
    weights[-8:] = 1.0
    offset = torch.zeros(width, device="cuda")
    found = run(distill.distill_cross_entropy, (student, teacher, offset, 0.1, 0.04, rows, False, weights))
    small = (student[-8:].clone(), teacher[-8:].clone(), offset, 0.1, 0.04, 8, False, weights[-8:].clone())
    expected = run(distill.distill_cross_entropy, small)
    torch.testing.assert_close(found["loss"], expected["loss"])
    assert torch.equal(found["gradient"][-8:], expected["gradient"])
    assert not found["gradient"][:-8].any()


def test_nothing_is_as_large_as_the_logits_in_float32() -> None:
    given = arguments(32, 10, 2, 65536)
    run(distill.distill_cross_entropy, given)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(distill.distill_cross_entropy, given)
    gradient = given[0].numel() * 2
    assert torch.cuda.max_memory_allocated() - before < 1.25 * gradient


def test_the_losses_run_it_and_compile() -> None:
    assert backend.choose("distill_cross_entropy", "cuda") == "triton"
    cls, patch = DINOLoss(8192).cuda(), IBOTPatchLoss(8192).cuda()
    student, teacher, *_ = arguments(4, 10, 2, 8192)
    masked, raw, *_, weights = arguments(37, 1, 1, 8192)
    loss = cls(student.requires_grad_(), teacher, 10, 0.04) + patch(masked.requires_grad_(), raw, weights, 8, 0.04)
    loss.backward()
    cls.apply_centre()
    assert loss.isfinite()
    assert student.grad.any()
    assert masked.grad.any()
    torch.testing.assert_close(cls.center[0], 0.1 * teacher.float().mean(0), rtol=1e-4, atol=1e-5)

    given = arguments(4, 10, 2, 8192)
    compiled = torch.compile(lambda s: ops.distill_cross_entropy(s, *given[1:]), fullgraph=True)
    ours, eager = run(lambda s, *_: compiled(s), given), run(ops.distill_cross_entropy, given)
    assert all(torch.equal(ours[name], eager[name]) for name in eager)
