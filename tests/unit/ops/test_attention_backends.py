"""Which implementation of attention runs where, and what each refuses."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from personvit import ops
from personvit.errors import UnsupportedInputError
from personvit.ops import attention, backend, reference, triton_kernels

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")


@pytest.fixture(autouse=True)
def _restore_backend() -> Iterator[None]:
    yield
    ops.set_backend("auto")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The implementations of a GPU also count as made for the CPU, so that `auto` considers them here."""
    operator = backend._operators["packed_attention"]
    faster = tuple(replace(implementation, devices=("cpu", "cuda")) for implementation in operator.faster)
    monkeypatch.setitem(backend._operators, "packed_attention", replace(operator, faster=faster))
    monkeypatch.setattr(backend, "_told", set())
    ops.set_backend("auto")  # forgets earlier choices


def gradient(function, qkv: torch.Tensor) -> torch.Tensor:
    qkv = qkv.detach().requires_grad_()
    return torch.autograd.grad(function(qkv).square().sum(), qkv)[0]


def test_order() -> None:
    operator = backend._operators["packed_attention"]
    assert [i.backend for i in operator.candidates("cuda")] == ["triton", "xformers", "sdpa"]
    assert [i.backend for i in operator.candidates("cpu")] == ["bmm", "sdpa"]
    assert [i.backend for i in operator.candidates("cpu", "triton")] == ["triton"]


@interpreted
def test_triton_mode_compiles_without_graph_breaks() -> None:
    ops.set_backend("triton")
    assert {row.op: row.backend for row in ops.report("cpu")}["packed_attention"] == "triton"
    groups = [(1, 33), (2, 5)]
    qkv = torch.randn(43, 3, 1, 32)
    compiled = torch.compile(lambda x: ops.packed_attention(x / 2, groups), fullgraph=True, backend="aot_eager")
    expected = gradient(lambda x: reference.packed_attention(x / 2, groups), qkv)
    torch.testing.assert_close(gradient(compiled, qkv), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(gradient(compiled, qkv), gradient(lambda x: ops.packed_attention(x / 2, groups), qkv))


@interpreted
def test_triton_mode_insists() -> None:
    ops.set_backend("triton")
    with pytest.raises(UnsupportedInputError, match=r"257 tokens.*at most 256.*Remedy: kernels.backend=auto"):
        ops.packed_attention(torch.randn(257, 3, 1, 32), [(1, 257)])
    with pytest.raises(UnsupportedInputError, match=r"head dimension 8.*32, 64, 128.*Remedy: another number of heads"):
        ops.packed_attention(torch.randn(5, 3, 1, 8), [(1, 5)])


@interpreted
def test_auto_falls_back_and_says_so_once(everywhere: None, caplog: pytest.LogCaptureFixture) -> None:
    long, short = torch.randn(257, 3, 1, 32), torch.randn(5, 3, 1, 32)
    with caplog.at_level(logging.WARNING, logger="personvit.ops.backend"):
        for _ in range(2):
            expected = F.scaled_dot_product_attention(*long.permute(1, 2, 0, 3).unbind())  # [1, 257, 32]
            torch.testing.assert_close(ops.packed_attention(long, [(1, 257)]), expected.transpose(0, 1))
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "not triton for this call" in message
    assert "257 tokens" in message
    kernel = triton_kernels.attention.packed_attention(short, [(1, 5)])
    assert torch.equal(ops.packed_attention(short, [(1, 5)]), kernel)


def test_why_not_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in attention._why_not_xformers("cuda")[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "no CUDA device (cpu" in attention._why_not_xformers("cpu")[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert attention._why_not_xformers("cuda") == ("xformers is not installed", 'pip install -e ".[gpu]"')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert attention._why_not_xformers("cuda") is None


def test_what_xformers_refuses() -> None:
    qkv = torch.randn(10, 3, 2, 64, dtype=torch.bfloat16)
    assert attention._xformers_refuses(qkv, [(2, 5)]) is None
    assert "torch.float32" in attention._xformers_refuses(qkv.float(), [(2, 5)])[0]
    assert "head dimension 20" in attention._xformers_refuses(qkv[..., :20], [(2, 5)])[0]
    assert "empty" in attention._xformers_refuses(qkv[:0], [(0, 5)])[0]


def test_xformers_gets_the_stream_in_place_and_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xformers")
    real = attention._xformers_ops()
    seen = []

    def on_the_cpu(q, k, v, attn_bias):
        seen.append((q, attn_bias))
        tokens = q.shape[1]
        bias = attn_bias.materialize((1, 1, tokens, tokens))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

    stub = SimpleNamespace(fmha=real.fmha, memory_efficient_attention=on_the_cpu)
    monkeypatch.setattr(attention, "_xformers_ops", lambda: stub)
    qkv, groups = torch.randn(19, 3, 2, 8), [(2, 5), (0, 4), (3, 3)]
    for _ in range(2):
        out = attention._xformers_packed(qkv, groups)
    torch.testing.assert_close(out, reference.packed_attention(qkv, groups))
    (q, mask), (_, again) = seen
    assert q.data_ptr() == qkv.data_ptr()
    assert mask is again  # no step builds it anew
