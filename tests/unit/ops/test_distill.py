from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from personvit import ops
from personvit.errors import UnsupportedInputError
from personvit.ops import backend, triton_kernels


def arguments(images: int = 2, views: int = 3, crops: int = 2, width: int = 8) -> list[Any]:
    """Student, teacher, offset, temperatures, images, exclude_own."""
    student, teacher = torch.randn(views * images, width), torch.randn(crops * images, width)
    return [student, teacher, torch.randn(width), 0.1, 0.05, images, True]


def pairs(given: list[Any], weights: Tensor | None = None) -> Tensor:
    """The loss one pair of a student row and a teacher row at a time."""
    student, teacher, offset, student_temp, teacher_temp, images, exclude_own = given
    total = student.new_zeros(())
    for r, row in enumerate(student):
        for t, raw in enumerate(teacher):
            if r % images == t % images and not (exclude_own and r // images == t // images):
                target = ((raw - offset) / teacher_temp).softmax(0)
                entropy = -(target * (row / student_temp).log_softmax(0)).sum()
                total = total + entropy * (1.0 if weights is None else weights[r])
    return total


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch):
    """Mode triton, in the interpreter, with the one kernel module that these tests need."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, tests/gpu runs them")
    monkeypatch.setattr(triton_kernels, "MODULES", ("distill",))
    triton_kernels.load.cache_clear()
    monkeypatch.setattr(backend, "_mode", "triton")
    backend._chosen.clear()
    yield
    triton_kernels.load.cache_clear()
    backend._chosen.clear()


@pytest.mark.parametrize("exclude_own", [True, False])
@pytest.mark.parametrize(("images", "views", "crops"), [(1, 2, 2), (2, 5, 2), (3, 3, 1), (2, 4, 3)])
def test_loss_is_the_sum_over_pairs(images: int, views: int, crops: int, exclude_own: bool) -> None:
    given = [*arguments(images, views, crops)[:-1], exclude_own]
    weights = torch.rand(views * images)
    for w in (None, weights):
        loss, column_sum = ops.distill_cross_entropy(*given, w)
        torch.testing.assert_close(loss, pairs(given, w), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(column_sum, given[1].sum(0))


def test_gradient_flows_to_the_student_alone() -> None:
    given = arguments()
    for tensor in given[:3]:
        tensor.requires_grad_()
    loss, column_sum = ops.distill_cross_entropy(*given)
    assert not column_sum.requires_grad
    loss.backward()
    assert given[1].grad is None
    assert given[2].grad is None
    (expected,) = torch.autograd.grad(pairs(given), given[0])
    torch.testing.assert_close(given[0].grad, expected, rtol=1e-5, atol=1e-5)


def test_an_undecided_student_pays_log_k_per_pair() -> None:
    given = arguments()
    given[0] = torch.zeros_like(given[0])
    loss, _ = ops.distill_cross_entropy(*given)
    torch.testing.assert_close(loss, torch.tensor(2 * 2 * 2 * math.log(8)))  # images, crops, other views


def test_a_crop_with_nothing_to_compare_with_costs_nothing() -> None:
    given = arguments(2, 1, 1)
    given[0].requires_grad_()
    loss, _ = ops.distill_cross_entropy(*given)
    (gradient,) = torch.autograd.grad(loss, given[0])
    assert loss == 0
    assert not gradient.any()


def test_no_images() -> None:
    student = torch.empty(0, 8, requires_grad=True)
    loss, column_sum = ops.distill_cross_entropy(
        student, torch.empty(0, 8), torch.zeros(8), 0.1, 0.05, 0, False, torch.empty(0)
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0
    assert torch.equal(column_sum, torch.zeros(8))
    assert gradient.shape == (0, 8)


def test_types_of_results() -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        given = [a.to(dtype) if i < 2 else a for i, a in enumerate(arguments())]
        given[0].requires_grad_()
        loss, column_sum = ops.distill_cross_entropy(*given)
        loss.backward()
        assert (loss.dtype, column_sum.dtype, given[0].grad.dtype) == (wide, wide, dtype)


WRONG = {
    "a teacher of another width": (1, torch.randn(4, 7), r"teacher \[rows, K\].*got \[4, 7\] and \[8\]"),
    "a student with three axes": (0, torch.randn(2, 3, 8), r"student \[rows, K\].*got \[2, 3, 8\]"),
    "an offset with two axes": (2, torch.randn(1, 8), r"got \[6, 8\] and \[1, 8\]"),
    "images that do not divide the rows": (5, 4, "6 rows of student are no views of images=4"),
    "no images but rows": (5, 0, "6 rows of student are no views of images=0"),
    "no rows but images": (0, torch.empty(0, 8), "0 rows of student are no views of images=2"),
    "a crop that is no view": (0, torch.randn(2, 8), "a student view of every teacher crop, got 2 rows"),
    "a temperature of zero": (4, 0.0, "temperatures 0.1 and 0.0 must be positive"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_said(wrong: str) -> None:
    given = arguments()
    place, value, message = WRONG[wrong]
    given[place] = value
    with pytest.raises(ValueError, match=message):
        ops.distill_cross_entropy(*given)


def test_a_weight_for_every_row() -> None:
    with pytest.raises(ValueError, match=r"a weight per row of the student, \[6\], got \[5\]"):
        ops.distill_cross_entropy(*arguments(), torch.ones(5))


def test_mode_triton_computes_what_the_reference_does(triton: None) -> None:
    given = arguments()
    loss, column_sum = ops.distill_cross_entropy(*given)
    torch.testing.assert_close(loss, pairs(given), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(column_sum, given[1].sum(0))
    assert backend.choose("distill_cross_entropy", "cpu") == "triton"


def test_mode_triton_insists(triton: None) -> None:
    given = arguments()
    given[0] = torch.randn(8, 6).t()
    with pytest.raises(UnsupportedInputError, match=r"triton.*distill_cross_entropy.*strides.*student.contiguous\(\)"):
        ops.distill_cross_entropy(*given)


def test_auto_takes_the_reference_for_what_the_kernels_refuse(
    triton: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "_mode", "auto")
    monkeypatch.setitem(backend._chosen, ("distill_cross_entropy", "cpu"), ("triton", "reference"))
    given = arguments()
    given[0] = torch.randn(8, 6).t()
    with caplog.at_level(logging.WARNING, logger="personvit.ops.backend"):
        loss, _ = ops.distill_cross_entropy(*given)
    torch.testing.assert_close(loss, pairs(given), rtol=1e-5, atol=1e-5)
    assert "not triton for this call: student of shape [6, 8] has strides" in caplog.text


@pytest.mark.parametrize("weighted", [True, False])
def test_compiles_without_graph_breaks(weighted: bool, triton: None) -> None:
    given, weights = arguments(), torch.rand(6) if weighted else None
    student = given[0].requires_grad_()

    def total(student: Tensor) -> Tensor:
        loss, column_sum = ops.distill_cross_entropy(student, *given[1:], weights)
        return loss.square() + column_sum.sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(student), student)
    (expected,) = torch.autograd.grad(total(student), student)
    torch.testing.assert_close(gradient, expected)
