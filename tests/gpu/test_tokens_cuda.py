"""Assembly and choice of tokens on CUDA, compiled: types and sizes of training, graphs, memory past 31 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from personvit.kernels import tokens
from personvit.ops.tokens import _reference

STEP = [(256, 128), (1024, 32)]
"""Crops and patches of each of a step's resolutions, 128 images."""
SHAPES = [(STEP, 384), (STEP, 768), ([(3, 19), (5, 1), (0, 7)], 33), ([(9, 197)], 192)]


def arguments(shapes: list[tuple[int, int]], width: int, low: torch.dtype, turned: bool = False) -> list[Any]:
    """Crops and patches of each resolution; the first is masked."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    patches = [random(b, width, n).to(low).transpose(1, 2) for b, n in shapes]
    masks = [torch.rand(*shapes[0], device="cuda") < 0.3, *[None] * (len(shapes) - 1)]
    positions = [random(1 + n, width) for _, n in shapes]
    return [patches if turned else [t.contiguous() for t in patches], masks, random(width), random(width), positions]


def run(function: Callable[..., Tensor], given: list[Any], double: bool = False) -> list[Tensor]:
    def leaf(tensor: Tensor) -> Tensor:
        return (tensor.double() if double else tensor).detach().requires_grad_()

    patches, masks, embed, cls_token, positions = given
    patches, positions = [leaf(t) for t in patches], [leaf(t) for t in positions]
    embed, cls_token = leaf(embed), leaf(cls_token)
    out = function(patches, masks, embed, cls_token, positions)
    weight = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    leaves = [*patches, embed, cls_token, *positions]
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("shapes", "width"), SHAPES, ids=str)
def test_against_float64(shapes: list[tuple[int, int]], width: int, low: torch.dtype, turned: bool) -> None:
    given = arguments(shapes, width, low, turned)
    ours, theirs, exact = run(tokens.assemble_tokens, given), run(_reference, given), run(_reference, given, True)
    for number, (mine, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert mine.dtype == other.dtype, number
        allowed = 2 * (other.double() - truth).norm() + torch.finfo(mine.dtype).eps * truth.norm() / 4
        assert (mine.double() - truth).norm() <= allowed, number


def test_ten_runs_agree_in_every_bit() -> None:
    given = arguments(STEP, 384, torch.bfloat16)
    first = run(tokens.assemble_tokens, given)
    for _ in range(9):
        assert all(map(torch.equal, first, run(tokens.assemble_tokens, given)))


def test_more_elements_than_31_bits_count() -> None:
    batch, length, width = 17_000, 128, 1024
    patches = torch.zeros(batch, length, width, device="cuda", dtype=torch.bfloat16)
    patches[-1] = torch.randn(length, width, device="cuda")
    positions = torch.randn(1 + length, width, device="cuda", dtype=torch.bfloat16)
    patches.requires_grad_()
    stream = tokens.assemble_tokens([patches], [None], None, positions[0], [positions])
    assert torch.equal(stream[-length:], patches[-1] + positions[1:])
    (gradient,) = torch.autograd.grad(stream[-1].sum(), patches)
    assert gradient[-1, -1].eq(1).all()
    assert not gradient[-1, :-1].any()


def test_runs_in_a_graph() -> None:
    given = arguments([(6, 128), (20, 32)], 384, torch.bfloat16)
    expected = tokens.assemble_tokens(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = tokens.assemble_tokens(*given)
    found.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_inductor_sees_no_graph_break() -> None:
    patches, masks, embed, cls_token, positions = arguments([(6, 128), (20, 32)], 384, torch.bfloat16, turned=True)
    embed.requires_grad_()

    def loss(embed: Tensor) -> Tensor:
        return tokens.assemble_tokens(patches, masks, embed, cls_token, positions).square().sum()

    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(embed), embed)
    (expected,) = torch.autograd.grad(loss(embed), embed)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("turned", [False, True])
def test_opcheck(turned: bool) -> None:
    patches, masks, embed, cls_token, positions = arguments([(3, 5), (2, 4)], 32, torch.float32, turned)
    leaves = [t.detach().requires_grad_() for t in patches]
    given = (leaves, masks[:1], [0, -1], embed.requires_grad_(), cls_token, positions)
    torch.library.opcheck(torch.ops.personvit.assemble_tokens.default, given)


def gather(
    function: Callable[[Tensor, Tensor], Tensor], stream: Tensor, rows: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Chosen rows, and the gradient of the stream for a sum with these weights."""
    stream = stream.detach().requires_grad_()
    out = function(stream, rows)
    return out.detach(), torch.autograd.grad(out, stream, weight)[0]


def gather_arguments(total: int, width: int, dtype: torch.dtype, chosen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stream, rows and weights of a loss."""
    rows = torch.randperm(total, device="cuda")[:chosen]
    stream, weight = (torch.randn(n, width, device="cuda").to(dtype) for n in (total, chosen))
    return stream, rows, weight


def plain_gather(stream: Tensor, rows: Tensor) -> Tensor:
    return stream.index_select(0, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("total", "width", "chosen"),
    [(66816, 384, 6180), (66816, 768, 6180), (1023, 192, 1023), (129, 33, 1), (7, 128, 0), (1, 3000, 1)],
)
def test_gather_is_exact(total: int, width: int, chosen: int, dtype: torch.dtype) -> None:
    arguments = gather_arguments(total, width, dtype, chosen)
    for mine, other in zip(gather(tokens.gather_rows, *arguments), gather(plain_gather, *arguments), strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, other)


def test_rows_that_do_not_exist() -> None:
    rows = torch.tensor([4, 9, -1, 1 << 40], device="cuda")
    found, gradient = gather(
        tokens.gather_rows, torch.randn(9, 48, device="cuda"), rows, torch.ones(4, 48, device="cuda")
    )
    assert found[0].isfinite().all()
    assert found[1:].isnan().all()
    assert gradient.sum(1).tolist() == [0, 0, 0, 0, 48, 0, 0, 0, 0]


def test_gather_of_more_elements_than_31_bits_count() -> None:
    total, width = 2_200_000, 1024
    stream = torch.zeros(total, width, device="cuda", dtype=torch.bfloat16)
    stream[-3:] = torch.randn(3, width, device="cuda")
    rows = torch.tensor([total - 1, 0, total - 3], device="cuda")
    weight = torch.randn(3, width, device="cuda").bfloat16()
    found, gradient = gather(tokens.gather_rows, stream, rows, weight)
    assert torch.equal(found, stream[rows])
    assert torch.equal(gradient[rows], weight)
    assert gradient.any(1).sum() == 3


def test_gather_in_a_graph_and_under_inductor() -> None:
    stream, rows, weight = gather_arguments(1000, 384, torch.bfloat16, 100)
    expected = gather(tokens.gather_rows, stream, rows, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = tokens.gather_rows(stream, rows)
    found.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected[0])
    compiled = torch.compile(tokens.gather_rows, fullgraph=True)
    assert all(map(torch.equal, gather(compiled, stream, rows, weight), expected))
    leaf = stream.requires_grad_()
    torch.library.opcheck(torch.ops.personvit.gather_rows.default, (leaf, rows))
