from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from personvit import ops


def test_groups_are_separate_sequences() -> None:
    groups = [(2, 5), (0, 9), (3, 2), (1, 1)]
    qkv = torch.randn(17, 3, 2, 8)
    out = ops.packed_attention(qkv, groups)
    assert out.shape == (17, 2, 8)
    changed = qkv.clone()
    changed[5:10] += 1.0  # the second sequence of the first group
    same = (ops.packed_attention(changed, groups) == out).flatten(1).all(1)
    assert same.tolist() == [True] * 5 + [False] * 5 + [True] * 7


def test_packed_equals_unpacked() -> None:
    qkv = torch.randn(4 * 7, 3, 2, 8)
    q, k, v = qkv.view(4, 7, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(28, 2, 8)
    torch.testing.assert_close(ops.packed_attention(qkv, [(4, 7)]), expected)


def test_non_contiguous_stream() -> None:
    storage = torch.randn(3, 10, 2, 8)
    qkv = storage.transpose(0, 1)
    assert not qkv.is_contiguous()
    assert torch.equal(ops.packed_attention(qkv, [(2, 5)]), ops.packed_attention(qkv.contiguous(), [(2, 5)]))


def test_empty_stream() -> None:
    assert ops.packed_attention(torch.randn(0, 3, 2, 8), []).shape == (0, 2, 8)
    assert ops.packed_attention(torch.randn(0, 3, 2, 8), [(0, 5)]).shape == (0, 2, 8)


def test_a_sequence_of_one_token_is_its_value() -> None:
    qkv = torch.randn(3, 3, 2, 8, requires_grad=True)
    out = ops.packed_attention(qkv, [(3, 1)])
    torch.testing.assert_close(out, qkv[:, 2])
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    torch.testing.assert_close(grad, torch.tensor([0.0, 0.0, 1.0])[None, :, None, None].expand_as(qkv))


@pytest.mark.parametrize("groups", [[], [(2, 4)], [(1, 9), (1, 2)], [(-1, 10), (2, 10)]])
def test_groups_must_add_up(groups: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="packed_attention: groups"):
        ops.packed_attention(torch.randn(10, 3, 2, 8), groups)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\[T, 3, H, Dh\], got \[10, 2, 2, 8\]"):
        ops.packed_attention(torch.randn(10, 2, 2, 8), [(1, 10)])


def test_compiles_without_graph_breaks() -> None:
    groups = [(2, 5), (3, 2)]
    qkv = torch.randn(16, 3, 2, 8, requires_grad=True)
    compiled = torch.compile(
        lambda x: ops.packed_attention(x, groups).square().sum(), fullgraph=True, backend="aot_eager"
    )
    (grad,) = torch.autograd.grad(compiled(qkv), qkv)
    (expected,) = torch.autograd.grad(ops.packed_attention(qkv, groups).square().sum(), qkv)
    torch.testing.assert_close(grad, expected)
