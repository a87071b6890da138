from __future__ import annotations

import pytest
import torch
from torch import Tensor

from personvit import ops
from personvit.ops import backend, triton_kernels


def arguments(width: int = 32) -> tuple[list[Tensor], list[Tensor | None], Tensor, Tensor, list[Tensor]]:
    patches = [torch.randn(3, 4, width), torch.randn(2, 2, width)]
    masks = [torch.tensor([[True, False, False, True]] * 2 + [[False] * 4]), None]
    return patches, masks, torch.randn(width), torch.randn(width), [torch.randn(5, width), torch.randn(3, width)]


def test_every_token_stands_where_it_belongs() -> None:
    patches, masks, masked_embed, cls_token, positions = arguments()
    stream = ops.assemble_tokens(patches, masks, masked_embed, cls_token, positions)
    assert stream.shape == (3 * 5 + 2 * 3, 32)
    second = stream[5:10]
    assert torch.equal(second[0], cls_token + positions[0][0])
    assert torch.equal(second[1], masked_embed + positions[0][1])
    assert torch.equal(second[2], patches[0][1, 1] + positions[0][2])
    assert torch.equal(stream[-1], patches[1][1, 1] + positions[1][2])


def test_masked_patches_get_no_gradient_and_the_mask_token_theirs() -> None:
    patches, masks, masked_embed, cls_token, positions = arguments()
    leaves = [t.requires_grad_() for t in (patches[0], masked_embed, cls_token, positions[0])]
    stream = ops.assemble_tokens(patches, masks, masked_embed, cls_token, positions)
    d_patches, d_embed, d_cls, d_positions = torch.autograd.grad(stream.sum(), leaves)
    assert torch.equal(d_patches[:, :, 0] == 0, masks[0])
    assert d_embed.tolist() == [4.0] * 32
    assert d_cls.tolist() == [5.0] * 32
    assert torch.equal(d_positions, torch.full((5, 32), 3.0))


def test_the_stream_is_as_wide_as_the_positions() -> None:
    patches, masks, masked_embed, cls_token, positions = arguments()
    low = [t.bfloat16() for t in patches]
    assert ops.assemble_tokens(low, masks, masked_embed, cls_token, positions).dtype == torch.float32
    lower = [t.bfloat16() for t in positions]
    assert ops.assemble_tokens(low, masks, masked_embed, cls_token, lower).dtype == torch.bfloat16


def test_the_mask_token_takes_part_though_nothing_is_masked() -> None:
    patches, masks, masked_embed, cls_token, positions = arguments()
    nothing = [torch.zeros_like(masks[0]), None]
    stream = ops.assemble_tokens(patches, nothing, masked_embed.requires_grad_(), cls_token, positions)
    assert not torch.autograd.grad(stream.sum(), masked_embed)[0].any()


WRONG = {
    "1 masks": lambda p, m, e, c, t: (p, m[:1], e, c, t),
    "0 patches": lambda p, m, e, c, t: ([], [], e, c, []),
    "masks without masked_embed": lambda p, m, e, c, t: (p, m, None, c, t),
    r"cls_token has shape \[1, 32\]": lambda p, m, e, c, t: (p, m, e, c[None], t),
    r"masked_embed has shape \[31\]": lambda p, m, e, c, t: (p, m, e[:-1], c, t),
    r"positions \[3, 32\]": lambda p, m, e, c, t: (p, m, e, c, [t[1], t[1]]),
    r"patches \[4, 32\]": lambda p, m, e, c, t: ([p[0][0], p[1]], m, e, c, t),
    r"a mask \[3, 3\]": lambda p, m, e, c, t: (p, [m[0][:, 1:], None], e, c, t),
    "torch.uint8": lambda p, m, e, c, t: (p, [m[0].byte(), None], e, c, t),
}


@pytest.mark.parametrize("message", WRONG)
def test_shapes_are_checked(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.assemble_tokens(*WRONG[message](*arguments()))


def test_gather_is_a_choice_in_order_and_its_gradient_is_zero_elsewhere() -> None:
    tokens = torch.randn(6, 32, requires_grad=True)
    rows = torch.tensor([5, 0, 2])
    found = ops.gather_rows(tokens, rows)
    assert torch.equal(found, torch.stack([tokens[5], tokens[0], tokens[2]]))
    weight = torch.randn(3, 32)
    (gradient,) = torch.autograd.grad(found, tokens, weight)
    assert torch.equal(gradient[rows], weight)
    assert not gradient[[1, 3, 4]].any()


def test_gather_of_no_rows_and_of_rows_that_do_not_exist() -> None:
    tokens = torch.randn(6, 32)
    assert ops.gather_rows(tokens, torch.tensor([], dtype=torch.int64)).shape == (0, 32)
    for row in (6, -1):
        with pytest.raises(IndexError):
            ops.gather_rows(tokens, torch.tensor([0, row]))


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        (torch.randn(6, 32), torch.tensor([[1]])),
        (torch.randn(6, 32), torch.tensor([1.0])),
        (torch.randn(6, 32), torch.tensor([True] * 6)),
        (torch.randn(2, 3, 32), torch.tensor([1])),
    ],
)
def test_what_gather_takes_is_checked(tokens: Tensor, rows: Tensor) -> None:
    with pytest.raises(ValueError, match=r"tokens \[T, D\] and rows \[R\] torch.int64, got \["):
        ops.gather_rows(tokens, rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, tests/gpu covers this")
@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_compiles_without_graph_breaks(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()  # a compiled function keeps the choice of its first call
    assert triton_kernels.why_not("cpu") is None
    monkeypatch.setattr(backend, "_mode", mode)
    monkeypatch.setattr(backend, "_chosen", {})
    patches, masks, masked_embed, cls_token, positions = arguments()
    leaves = [t.requires_grad_() for t in (*patches, masked_embed, cls_token, *positions)]

    def loss(a: Tensor, b: Tensor, mask: Tensor, embed: Tensor, cls: Tensor, table: Tensor, small: Tensor) -> Tensor:
        stream = ops.assemble_tokens([a, b], [mask, None], embed, cls, [table, small])
        return stream.square().sum() + ops.gather_rows(stream, torch.arange(1, len(stream), 2)).pow(3).sum()

    given = (*patches, masks[0], masked_embed, cls_token, *positions)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*given), leaves)
    monkeypatch.setattr(backend, "_mode", "reference")
    backend._chosen.clear()
    for a, b in zip(found, torch.autograd.grad(loss(*given), leaves), strict=True):
        torch.testing.assert_close(a, b)
