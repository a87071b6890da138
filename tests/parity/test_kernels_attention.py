"""Attention kernels in Triton's interpreter against a float64 oracle: at most twice torch's own error."""

from __future__ import annotations

import pytest
import torch

from personvit.errors import UnsupportedInputError
from personvit.kernels import attention
from personvit.ops import reference

if torch.cuda.is_available():
    pytest.skip("kernels are not interpreted where there is a GPU: tests/gpu runs them", allow_module_level=True)

LENGTHS = (1, 19, 33, 63, 65, 127, 128, 129, 197, 256)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write is NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: empty_like(*args, **options).fill_(torch.nan))


@pytest.fixture(params=["float32", "float32-resident", "float16"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The second: kernels that only 16-bit types take, in a precision that shows every slip."""
    if request.param == "float32-resident":
        monkeypatch.setattr(attention, "RESIDENT_TYPES", (torch.float32,))
    return getattr(torch, request.param.partition("-")[0])


def run(function, qkv: torch.Tensor, groups, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, groups)
    (grad,) = torch.autograd.grad(out, qkv, weight.to(out.dtype))
    return out.detach().double(), grad.double()


def check(qkv: torch.Tensor, groups: list[tuple[int, int]]) -> None:
    weight = torch.randn(qkv.shape[0], *qkv.shape[2:]).to(qkv.dtype)
    exact = run(reference.packed_attention, qkv.double(), groups, weight)
    plain = run(reference.packed_attention, qkv, groups, weight)
    ours = run(attention.packed_attention, qkv, groups, weight)
    # Where plain torch happens to be exact, one rounding of the result is still allowed.
    rounding = torch.finfo(qkv.dtype).eps
    for part in (lambda pair: pair[0], *(lambda pair, i=i: pair[1][:, i] for i in range(3))):  # out, dq, dk, dv
        truth, theirs, mine = part(exact), part(plain), part(ours)
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + rounding * truth.norm() / 4


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(length: int, dtype: torch.dtype) -> None:
    check(torch.randn(length, 3, 1, 64).to(dtype), [(1, length)])


@pytest.mark.parametrize("head_dim", [32, 128])
def test_head_dimensions(head_dim: int, dtype: torch.dtype) -> None:
    check(torch.randn(33 + 19 + 129, 3, 1, head_dim).to(dtype), [(1, 33), (1, 19), (1, 129)])


def test_groups_sequences_and_heads(dtype: torch.dtype) -> None:
    groups = [(0, 129), (2, 33), (0, 5), (3, 20), (1, 65)]
    check(torch.randn(191, 3, 2, 32).to(dtype), groups)


@pytest.mark.parametrize("length", [19, 33, 129])
@pytest.mark.parametrize("offset", [-60.0, 60.0])
def test_scores_far_from_zero(offset: float, length: int, dtype: torch.dtype) -> None:
    """Far below zero, where exp(score) is 0 and a padded key, whose score is 0, would outweigh all; far above, inf."""
    qkv = torch.randn(length, 3, 1, 64)
    qkv[:, 0] = 8.0 * offset / 64 + 0.1 * qkv[:, 0]  # q k^T / 8 is about 4 * offset
    qkv[:, 1] = 4.0 + 0.1 * qkv[:, 1]
    check(qkv.to(dtype), [(1, length)])


@pytest.mark.parametrize("length", [33, 65, 129])
def test_each_row_has_its_own_weight(length: int, dtype: torch.dtype) -> None:
    """One key for each query: a slip in the order of tokens, which random scores hide, moves whole rows."""
    qkv = torch.zeros(length, 3, 1, 128)
    directions = torch.linalg.qr(torch.randn(128, 128))[0]
    order = torch.randperm(length)
    kept = min(length, 128)
    qkv[:kept, 1, 0] = 40.0 * directions[:kept]
    qkv[:, 0, 0] = qkv[order, 1, 0]
    qkv[:, 2, 0] = torch.randn(length, 128)
    out = attention.packed_attention(qkv.to(dtype), [(1, length)])
    hit = order < kept
    torch.testing.assert_close(out[hit, 0], qkv[order[hit], 2, 0].to(dtype), atol=1e-3, rtol=0)


def test_same_bits_twice(dtype: torch.dtype) -> None:
    groups = [(1, 129), (2, 33), (1, 70)]
    qkv, weight = torch.randn(265, 3, 1, 32).to(dtype), torch.randn(265, 1, 32).to(dtype)
    first, second = (run(attention.packed_attention, qkv, groups, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_order_of_the_stream_does_not_matter(dtype: torch.dtype) -> None:
    qkv, weight = torch.randn(99, 3, 1, 32).to(dtype), torch.randn(99, 1, 32).to(dtype)
    order = torch.arange(99).view(3, 33).flip(0).flatten()
    straight = run(attention.packed_attention, qkv, [(3, 33)], weight)
    turned = run(attention.packed_attention, qkv[order], [(1, 33), (2, 33)], weight[order])
    assert all(torch.equal(a[order], b) for a, b in zip(straight, turned, strict=True))


@pytest.mark.parametrize("groups", [[], [(0, 33)]])
@pytest.mark.parametrize("heads", [0, 2])
def test_empty_stream(groups: list[tuple[int, int]], heads: int) -> None:
    out, grad = run(attention.packed_attention, torch.randn(0, 3, heads, 64), groups, torch.randn(0, heads, 64))
    assert out.shape == (0, heads, 64)
    assert grad.shape == (0, 3, heads, 64)


def test_gradient_of_a_sum_is_an_expanded_tensor() -> None:
    qkv = torch.randn(33, 3, 1, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(attention.packed_attention(qkv, [(1, 33)]).sum(), qkv)
    (expected,) = torch.autograd.grad(reference.packed_attention(qkv, [(1, 33)]).sum(), qkv)
    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("sequences", "lengths"), [([1, 2], [33, 5]), ([], []), ([0], [129])])
def test_opcheck(sequences: list[int], lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # poisoned memory differs from itself
    tokens = sum(count * length for count, length in zip(sequences, lengths, strict=True))
    qkv = torch.randn(tokens, 3, 1, 32, requires_grad=True)
    torch.library.opcheck(torch.ops.personvit.packed_attention.default, (qkv, sequences, lengths))
    arguments = (torch.randn(tokens, 1, 32), qkv.detach(), sequences, lengths)
    torch.library.opcheck(torch.ops.personvit.packed_attention_backward.default, arguments)


BAD = {
    "type": (lambda: torch.randn(10, 3, 1, 32).double(), [(2, 5)], r"qkv is torch.float64.*float32.*Remedy"),
    "device": (lambda: torch.empty(10, 3, 1, 32, device="meta"), [(2, 5)], r"qkv is on meta.*Remedy"),
    "strides": (lambda: torch.randn(3, 10, 1, 32).transpose(0, 1), [(2, 5)], r"strides \[32, 320, 32, 1\].*contiguous"),
    "alignment": (lambda: torch.randn(961)[1:].view(10, 3, 1, 32), [(2, 5)], r"multiple of 16 bytes.*clone"),
    "head": (lambda: torch.randn(10, 3, 1, 48), [(2, 5)], r"head dimension 48.*\[10, 3, 1, 48\] torch.float32 on cpu"),
    "width": (lambda: torch.randn(1, 3, 1 << 14, 128), [(1, 1)], r"width 2097152.*at most 1048576"),
    "length": (lambda: torch.randn(257, 3, 1, 32), [(1, 257)], r"257 tokens.*at most 256.*kernels.backend=auto"),
    "tokens": (lambda: torch.randn(10, 3, 1, 32), [(2, 4)], r"\[\(2, 4\)\] do not add up to 10 tokens"),
    "negative": (lambda: torch.randn(10, 3, 1, 32), [(-1, 10), (2, 10)], r"-1 sequences of 10 tokens"),
    "zero": (lambda: torch.randn(10, 3, 1, 32), [(1, 10), (1, 0)], r"1 sequences of 0 tokens"),
    "shape": (lambda: torch.randn(10, 2, 1, 32), [(2, 5)], r"qkv has shape \[10, 2, 1, 32\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    make, groups, message = BAD[case]
    qkv = make()
    assert attention.refuses(qkv, groups) is not None
    with pytest.raises(UnsupportedInputError, match=message):
        # Under the dispatcher a tensor of `meta` would only meet the fake kernel.
        attention._packed_attention._init_fn(qkv, [n for n, _ in groups], [length for _, length in groups])


def test_a_gradient_of_another_kind_is_refused() -> None:
    qkv = torch.randn(10, 3, 1, 32)
    for grad, message in (
        (torch.randn(10, 1, 32).half(), r"mixed types.*grad torch.float16"),
        (torch.randn(9, 1, 32), r"another shape.*a grad of shape \[10, 1, 32\]"),
        (torch.randn(10, 1, 64)[..., :32], r"grad of shape \[10, 1, 32\] has strides"),
    ):
        with pytest.raises(UnsupportedInputError, match=message):
            attention._packed_attention_backward(grad, qkv, [2], [5])
