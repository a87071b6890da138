"""Attention against a float64 oracle: at most twice as far off as plain torch in the same type, gradients too."""

from __future__ import annotations

import pytest
import torch

from personvit.ops import backend, packed_attention, reference

FAST = {i.backend: i.function for i in backend._operators["packed_attention"].candidates("cpu")}


def run(function, qkv: torch.Tensor, groups, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, groups)
    (grad,) = torch.autograd.grad((out * weight.to(out.dtype)).sum(), qkv)
    return out.detach().double(), grad.double()


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "groups",
    [[(2, 129), (3, 33)], [(2, 19), (1, 63)], [(1, 127), (0, 8), (1, 128)], [(1, 1023)]],
    ids=str,
)
def test_packed_attention(fast: str, dtype: torch.dtype, groups: list[tuple[int, int]]) -> None:
    tokens = sum(sequences * length for sequences, length in groups)
    qkv = torch.randn(tokens, 3, 2, 32).to(dtype)
    weight = torch.randn(tokens, 2, 32)
    exact = run(reference.packed_attention, qkv.double(), groups, weight.double())
    plain = run(reference.packed_attention, qkv, groups, weight)
    ours = run(FAST[fast], qkv, groups, weight)
    # Where plain torch happens to be exact, one rounding of the result is still allowed.
    rounding = torch.finfo(dtype).eps
    for truth, theirs, mine in zip(exact, plain, ours, strict=True):
        allowed = 2 * (theirs - truth).norm() + rounding * truth.norm() / 4
        assert (mine - truth).norm() <= allowed


def test_public_function_runs_a_fast_one() -> None:
    qkv = torch.randn(10, 3, 2, 8)
    assert torch.equal(packed_attention(qkv, [(2, 5)]), FAST["bmm"](qkv, [(2, 5)]))
