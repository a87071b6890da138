"""The Triton kernels of the distillation loss in the interpreter, against a float64 oracle and plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from personvit.errors import UnsupportedInputError
from personvit.kernels import distill
from personvit.ops.distill import _reference

if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, tests/gpu compares them", allow_module_level=True)

FORWARD = torch.ops.personvit.distill_cross_entropy.default
BACKWARD = torch.ops.personvit.distill_cross_entropy_backward.default


class Case(NamedTuple):
    """Sizes of a call; `crops` teacher crops and `views` student views of each image."""

    width: int
    images: int
    views: int
    crops: int = 2
    exclude_own: bool = True
    weighted: bool = False
    spread: float = 1.0


CASES = [
    Case(1, 2, 3),
    Case(1000, 3, 10),
    Case(1000, 2, 3, exclude_own=False, weighted=True),
    Case(1000, 2, 4, crops=3, weighted=True),
    Case(1000, 2, 2, crops=1),
    Case(127, 33, 1, crops=1, exclude_own=False, weighted=True),
    Case(5000, 1, 2),
    Case(8192, 2, 3),
    Case(8192, 5, 1, crops=1, exclude_own=False, weighted=True),
    Case(65536, 1, 3, weighted=True),
    Case(65536, 2, 1, crops=1, exclude_own=False),
]
DRAWS = 8
LARGE = [Case(1000, 3, 10, spread=1e4), Case(8192, 3, 1, 1, exclude_own=False, weighted=True, spread=1e4)]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody writes shows up as NaN."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


def arguments(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    rows = case.images * case.views
    student = (case.spread * torch.randn(rows, case.width)).to(dtype)
    teacher = (case.spread * torch.randn(case.images * case.crops, case.width) + 0.3).to(dtype)
    weights = torch.rand(rows) if case.weighted else None
    if weights is not None:
        weights[::3] = 0.0
    return student, teacher, torch.randn(case.width), 0.1, 0.06, case.images, case.exclude_own, weights


def run(function: Callable[..., Any], given: tuple[Any, ...]) -> dict[str, Tensor]:
    student = given[0].detach().requires_grad_()
    loss, column_sum = function(student, *given[1:])
    (gradient,) = torch.autograd.grad(0.7 * loss, student)
    return {"loss": loss.detach(), "column_sum": column_sum, "gradient": gradient}


def compare(*draws: tuple[Any, ...]) -> None:
    """Over some draws of arguments, results and gradients of the kernels err at most twice as much as plain torch's.

    Several, because a loss is one number, and plain torch's rounding may hit its true value by chance.
    """
    ours = [run(distill.distill_cross_entropy, given) for given in draws]
    theirs = [run(_reference, given) for given in draws]
    exact = [run(_reference, tuple(a.double() if isinstance(a, Tensor) else a for a in given)) for given in draws]
    for name in exact[0]:
        dtype = draws[0][0].dtype if name == "gradient" else torch.float32
        for mine, other, truth in zip(ours, theirs, exact, strict=True):
            assert mine[name].dtype == other[name].dtype == dtype
            assert mine[name].shape == truth[name].shape
        mine, other, truth = (
            torch.cat([found[name].double().flatten() for found in runs]) for runs in (ours, theirs, exact)
        )
        # Where plain torch happens to be exact, one rounding of the result is still allowed: half the distance of two
        # neighbours at most, half of that over many numbers.
        rounding = torch.finfo(dtype).eps / (2 if name == "loss" else 4)
        allowed = 2 * (other - truth).norm() + rounding * truth.norm()
        assert (mine - truth).norm() <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_sums_and_gradient(case: Case, dtype: torch.dtype) -> None:
    compare(*(arguments(case, dtype) for _ in range(DRAWS)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_logits_neither_overflow_nor_lose_digits(case: Case, dtype: torch.dtype) -> None:
    draws = [arguments(case, dtype) for _ in range(DRAWS)]
    assert all(value.isfinite().all() for value in run(distill.distill_cross_entropy, draws[0]).values())
    compare(*draws)


def test_logits_of_two_types() -> None:
    draws = [arguments(Case(1000, 2, 3)) for _ in range(DRAWS)]
    compare(*((student.half(), *others) for student, *others in draws))


def test_more_teacher_rows_than_one_program_sums_up() -> None:
    compare(*(arguments(Case(130, 35, 2)) for _ in range(2)))


def test_a_logit_that_is_not_finite_shows() -> None:
    """The step is skipped where loss or gradient is not finite: they must not hide it."""
    for which in (0, 1):
        given = arguments(Case(1000, 2, 3))
        given[which][1, 7] = float("nan")
        found = run(distill.distill_cross_entropy, given)
        assert found["loss"].isnan()
        assert found["gradient"].isnan().any()


def test_rows_without_weight_get_no_gradient() -> None:
    given = arguments(Case(1000, 3, 2, weighted=True))
    gradient = run(distill.distill_cross_entropy, given)["gradient"]
    assert not gradient[::3].any()
    assert gradient[1::3].any()


def test_two_runs_agree_in_every_bit() -> None:
    given = arguments(Case(8192, 2, 3, weighted=True), torch.float16)
    first, second = (run(distill.distill_cross_entropy, given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("weighted", [False, True])
def test_no_images(weighted: bool) -> None:
    found = run(distill.distill_cross_entropy, arguments(Case(1000, 0, 3, weighted=weighted)))
    assert found["loss"] == 0
    assert torch.equal(found["column_sum"], torch.zeros(1000))
    assert found["gradient"].shape == (0, 1000)


@pytest.mark.parametrize("case", [Case(33, 2, 3), Case(33, 3, 1, 1, exclude_own=False, weighted=True), Case(33, 0, 2)])
def test_opcheck(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the check compares allocations, unwritten ones too
    student, *others = arguments(case)
    torch.library.opcheck(FORWARD, (student.requires_grad_(), *others))
    *_, teacher_stats, student_stats = FORWARD(student.detach(), *others)
    teacher, offset, *settings = others
    given = (torch.ones(()), student.detach(), teacher, offset, teacher_stats, student_stats, *settings)
    torch.library.opcheck(BACKWARD, given)


WRONG = {
    "float64 student": (0, lambda t: t.double(), "student is torch.float64"),
    "columns of a wider teacher": (1, lambda t: torch.cat([t, t], 1)[:, :9], "teacher of shape .* has strides"),
    "half offset": (2, lambda t: t.half(), "offset is torch.float16, the kernel takes float32"),
    "another width": (1, lambda t: t[:, :8].contiguous(), "shapes do not fit"),
    "another offset": (2, lambda t: t[:8], "shapes do not fit"),
    "fewer images": (5, lambda images: images + 2, "shapes do not fit"),
    "no images": (5, lambda images: 0, "shapes do not fit"),
    "another number of weights": (7, lambda weights: torch.ones(5), "shapes do not fit"),
    "fewer views than crops": (0, lambda t: t[:2], "shapes do not fit"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_kernels_refuse(wrong: str) -> None:
    given = list(arguments(Case(9, 2, 3)))
    assert distill.refuses(*given) is None
    place, change, message = WRONG[wrong]
    given[place] = change(given[place])
    with pytest.raises(UnsupportedInputError, match=message):
        distill.distill_cross_entropy(*given)


def test_tensors_on_different_devices() -> None:
    given = list(arguments(Case(9, 2, 3)))
    given[1] = given[1].to("meta")
    reason, _ = distill.refuses(*given)
    assert "teacher is on meta" in reason
