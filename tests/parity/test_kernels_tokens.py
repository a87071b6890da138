"""The Triton kernels of token assembly and choice in the interpreter, against a float64 oracle and plain torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from personvit.errors import UnsupportedInputError
from personvit.kernels import tokens
from personvit.ops.tokens import _reference

if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, tests/gpu compares them", allow_module_level=True)

KINDS = {
    # types of patches and of everything else
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16 patches": (torch.float16, torch.float32),
}


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody writes shows up as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


class Case(NamedTuple):
    patches: list[Tensor]
    masks: list[Tensor | None]
    masked_embed: Tensor | None
    cls_token: Tensor
    positions: list[Tensor]

    def floats(self) -> list[Tensor]:
        embed = [] if self.masked_embed is None else [self.masked_embed]
        return [*self.patches, *embed, self.cls_token, *self.positions]

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        embed = None if self.masked_embed is None else change(self.masked_embed)
        return Case(
            [change(t) for t in self.patches],
            self.masks,
            embed,
            change(self.cls_token),
            [change(t) for t in self.positions],
        )


def case(
    shapes: Sequence[tuple[int, int]], width: int, kind: str = "fp32", masked: Sequence[float | None] | None = None,
    turned: bool = False,
) -> Case:  # fmt: skip
    """`shapes`: crops and patches of each resolution; `masked`: share of masked patches, None: no mask."""
    low, high = KINDS[kind]
    patches = [torch.randn(b, width, n).to(low).transpose(1, 2) for b, n in shapes]
    masked = [0.4] + [None] * (len(shapes) - 1) if masked is None else masked
    masks = [None if share is None else torch.rand(*shape) < share for share, shape in zip(masked, shapes, strict=True)]
    return Case(
        patches if turned else [t.contiguous() for t in patches],
        masks,
        torch.randn(width).to(high) if any(share is not None for share in masked) else None,
        torch.randn(width).to(high),
        [torch.randn(1 + n, width).to(high) for _, n in shapes],
    )


def run(function: Callable[..., Tensor], given: Case, like: torch.dtype | None = None) -> list[Tensor]:
    """The stream, then the gradient of every floating tensor, of a sum with fixed weights."""
    given = given.map(lambda t: t.detach().requires_grad_())
    out = function(*given)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(like or out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given.floats(), weight.to(out.dtype))]


def compare(given: Case) -> None:
    """The stream and every gradient err at most twice as much as those of plain torch."""
    ours, theirs = run(tokens.assemble_tokens, given), run(_reference, given)
    exact = run(_reference, given.map(Tensor.double), like=ours[0].dtype)
    for number, (mine, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert mine.dtype == other.dtype, number
        assert mine.shape == truth.shape, number
        # Where plain torch happens to be exact, one rounding of the result is still allowed.
        allowed = 2 * (other.double() - truth).norm() + torch.finfo(mine.dtype).eps * truth.norm() / 4
        assert (mine.double() - truth).norm() <= allowed, number


@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 8, 19, 33, 63, 127, 128, 197])
def test_lengths(length: int, kind: str, turned: bool) -> None:
    compare(case([(3, length), (11, 8)], 32, kind, turned=turned))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [33, 128, 192, 384, 768])
def test_widths(width: int, kind: str) -> None:
    compare(case([(2, 19), (3, 7)], width, kind, turned=width == 192))


@pytest.mark.parametrize("masked", [(1.1, None), (-1.0, None), (None, None), (0.5, 0.5), (None, 0.3)], ids=str)
def test_masks(masked: tuple[float | None, ...]) -> None:
    compare(case([(10, 9), (5, 4)], 48, "fp16 patches", masked))


def test_the_mask_token_takes_part_though_nothing_is_masked() -> None:
    given = case([(2, 5)], 32, masked=[-1.0])
    gradient = run(tokens.assemble_tokens, given)[2]
    assert not gradient.any()
    # ... and without any mask it does not, as in plain torch
    without = given._replace(masks=[None]).map(lambda t: t.requires_grad_())
    assert torch.autograd.grad(
        tokens.assemble_tokens(*without).sum(), without.masked_embed, allow_unused=True
    ) == (None,)  # fmt: skip


@pytest.mark.parametrize("shapes", [[(0, 8), (3, 4)], [(0, 8)], [(2, 5), (0, 3), (1, 1)]], ids=str)
def test_no_crops(shapes: list[tuple[int, int]]) -> None:
    compare(case(shapes, 32))
    found = run(tokens.assemble_tokens, case(shapes, 32))
    assert all(tensor.isfinite().all() for tensor in found)


def test_gradients_have_the_layout_of_the_patches() -> None:
    given = case([(3, 9), (2, 5)], 32)
    given.patches[1] = case([(2, 5)], 32, turned=True).patches[0]
    gradients = run(tokens.assemble_tokens, given)[1:3]
    assert [g.stride() for g in gradients] == [(9 * 32, 32, 1), (5 * 32, 1, 5)]
    compare(given)


def test_the_gradient_of_cls_is_no_part_of_that_of_positions() -> None:
    _, _, _, cls_token, positions = run(tokens.assemble_tokens, case([(3, 9)], 32))
    assert torch.equal(cls_token, positions[0])
    assert cls_token.untyped_storage().data_ptr() != positions.untyped_storage().data_ptr()


def test_two_runs_agree_in_every_bit() -> None:
    given = case([(20, 40), (33, 9)], 64, "fp16 patches")
    assert all(map(torch.equal, run(tokens.assemble_tokens, given), run(tokens.assemble_tokens, given)))


@pytest.mark.parametrize("masked", [(0.5, None), (None, None)], ids=str)
@pytest.mark.parametrize("shapes", [[(3, 5), (2, 4)], [(0, 5), (2, 4)]], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_opcheck(shapes: list[tuple[int, int]], masked: tuple[float | None, ...], turned: bool) -> None:
    patches, masks, embed, cls_token, positions = case(shapes, 32, masked=masked, turned=turned).map(
        lambda t: t.detach().requires_grad_()
    )
    mask_of = [-1 if mask is None else 0 for mask in masks]
    given = [mask for mask in masks if mask is not None]
    arguments = (patches, given, mask_of, embed, cls_token, positions)
    torch.library.opcheck(torch.ops.personvit.assemble_tokens.default, arguments)


def test_opcheck_backward() -> None:
    arguments = (torch.randn(3 * 6 + 2 * 5, 32), [torch.rand(3, 5) < 0.5], [0, -1], [3, 2], [5, 4], [False, True])
    torch.library.opcheck(torch.ops.personvit.assemble_tokens_backward.default, (*arguments, torch.float16))


WRONG = {
    "counts": (lambda c: c._replace(masks=c.masks[:1]), "1 masks"),
    "positions missing": (lambda c: c._replace(positions=c.positions[:1]), "1 positions"),
    "no mask token": (lambda c: c._replace(masked_embed=None), "without a masked_embed"),
    "mask shape": (lambda c: c._replace(masks=[torch.ones(3, 6, dtype=torch.bool), None]), r"mask of shape \[3, 6\]"),
    "mask type": (lambda c: c._replace(masks=[torch.ones(3, 5), None]), "a mask is torch.float32"),
    "mask device": (lambda c: c._replace(masks=[c.masks[0].to("meta"), None]), "on meta"),
    "positions length": (lambda c: c._replace(positions=[c.positions[0], c.positions[0]]), "positions of shape"),
    "positions type": (lambda c: c._replace(positions=[c.positions[0], c.positions[1].half()]), "mixed types"),
    "patches type": (lambda c: c._replace(patches=[c.patches[0], c.patches[1].half()]), "mixed types"),
    "patches strides": (lambda c: c._replace(patches=[c.patches[0], torch.randn(2, 8, 32)[:, ::2]]), "strides"),
    "patches device": (lambda c: c._replace(patches=[t.to("meta") for t in c.patches]), "on cpu"),
    "mixed devices": (lambda c: c._replace(positions=[c.positions[0].to("meta"), c.positions[1]]), "on meta"),
    "width": (lambda c: c._replace(cls_token=torch.randn(16)), r"masked_embed of shape \[32\]"),
    "embed width": (lambda c: c._replace(masked_embed=torch.randn(1)), r"masked_embed of shape \[1\]"),
    "float64": (lambda c: c.map(Tensor.double), "float64"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_kernel_cannot_do_is_said(wrong: str) -> None:
    change, message = WRONG[wrong]
    given = change(case([(3, 5), (2, 4)], 32))
    reason, remedy = tokens.refuses(*given)
    assert re.search(message, reason)
    assert remedy
    if not any(t.is_meta for t in [*given.floats(), *given.masks] if t is not None):  # those find only shapes
        with pytest.raises(UnsupportedInputError, match=message):
            tokens.assemble_tokens(*given)


def gather(
    function: Callable[[Tensor, Tensor], Tensor], stream: Tensor, rows: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Chosen rows, and the gradient of the stream for a sum with these weights."""
    stream = stream.detach().requires_grad_()
    out = function(stream, rows)
    return out.detach(), torch.autograd.grad(out, stream, weight)[0]


def compare_gather(total: int, width: int, rows: Tensor, dtype: torch.dtype) -> None:
    """Nothing is computed, so every bit must agree with plain torch, of the gradient too."""
    stream, weight = torch.randn(total, width).to(dtype), torch.randn(len(rows), width).to(dtype)
    ours = gather(tokens.gather_rows, stream, rows, weight)
    theirs = gather(lambda stream, rows: stream.index_select(0, rows), stream, rows, weight)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, other)


# The bits of bfloat16 are moved as they are: what the interpreter gets wrong of it takes no part here.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("total", "width"), [(70, 32), (16, 128), (17, 192), (300, 384), (9, 768), (1, 1024), (8, 33), (3, 3000)]
)
def test_gather(total: int, width: int, dtype: torch.dtype) -> None:
    compare_gather(total, width, torch.randperm(total)[: (total + 1) // 2], dtype)


@pytest.mark.parametrize("chosen", [[], [6], [3, 0, 6, 1, 5, 2, 4]], ids=["none", "one", "all"])
def test_gather_of_no_one_and_all_rows(chosen: list[int]) -> None:
    compare_gather(7, 192, torch.tensor(chosen, dtype=torch.int64), torch.float32)


@pytest.mark.parametrize(("total", "width"), [(0, 32), (5, 0)])
def test_gather_of_nothing(total: int, width: int) -> None:
    compare_gather(total, width, torch.arange(total), torch.float32)


def test_gather_of_more_rows_than_a_program_takes() -> None:
    compare_gather(700, 4, torch.randperm(700)[:300], torch.float32)


def test_rows_that_do_not_exist_are_seen_and_harm_nothing() -> None:
    # The stream lies amid other values: a row read outside of it would not be NaN.
    memory, rows = torch.randn(27, 48), torch.tensor([4, 2, 9, -1, 1 << 40, -(1 << 40)])
    weight = torch.randn(6, 48)
    found, gradient = gather(tokens.gather_rows, memory[9:18], rows, weight)
    assert torch.equal(found[:2], memory[[13, 11]])
    assert found[2:].isnan().all()
    expected = torch.zeros(9, 48)
    expected[[4, 2]] = weight[:2]
    assert torch.equal(gradient, expected)


def test_a_gradient_that_is_not_contiguous() -> None:
    stream, rows = torch.randn(7, 48), torch.tensor([5, 0, 3])
    (_, ours), (_, theirs) = (
        gather(function, stream, rows, torch.randn(48, generator=torch.Generator().manual_seed(1)).expand(3, 48))
        for function in (tokens.gather_rows, lambda stream, rows: stream.index_select(0, rows))
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("chosen", [[3, 0], []])
@pytest.mark.parametrize("total", [5, 0])
def test_opcheck_gather(chosen: list[int], total: int) -> None:
    rows = torch.tensor(chosen if total else [], dtype=torch.int64)
    stream = torch.randn(total, 32, requires_grad=True)
    torch.library.opcheck(torch.ops.personvit.gather_rows.default, (stream, rows))
    torch.library.opcheck(torch.ops.personvit.gather_rows_backward.default, (torch.randn(len(rows), 32), rows, total))


@pytest.mark.parametrize(
    ("stream", "rows", "message"),
    [
        (torch.randn(32, 6).t(), torch.arange(2), "strides"),
        (torch.randn(6, 32, dtype=torch.float64), torch.arange(2), "float64"),
        (torch.randn(2, 3, 32), torch.arange(2), r"\[2, 3, 32\]"),
        (torch.randn(6, 32), torch.arange(2, dtype=torch.int32), "int32"),
        (torch.randn(6, 32), torch.tensor([[1, 2]]), "a list of rows"),
        (torch.randn(6, 32), torch.arange(6)[::2], "strides"),
        (torch.randn(6, 32), torch.arange(6)[1:], "16 bytes"),
        (torch.randn(6, 32, device="meta"), torch.arange(2), "on meta"),
        (torch.randn(6, 32), torch.arange(2, device="meta"), "on meta"),
    ],
)
def test_what_gather_cannot_do_is_said(stream: Tensor, rows: Tensor, message: str) -> None:
    reason, remedy = tokens.refuses_gather_rows(stream, rows)
    assert re.search(message, reason)
    assert remedy
    if not (stream.is_meta or rows.is_meta):  # those find only shapes
        with pytest.raises(UnsupportedInputError, match=message):
            tokens.gather_rows(stream, rows)
