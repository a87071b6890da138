"""Norm kernels on CUDA, compiled: bfloat16 as in training, sizes of training, streams, graphs, memory past 31 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from personvit.kernels import norm
from personvit.ops import norm as reference

EPS = 1e-6


def add_arguments(count: int, width: int, low: torch.dtype, terms: str = "scale gamma") -> tuple[Any, ...]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    branch = random(count, width).to(low) if terms else None
    scale = (torch.rand(count, device="cuda") < 0.9).float() / 0.9 if "scale" in terms else None
    gamma = random(width) if "gamma" in terms else None
    return random(count, width) + 0.5, branch, scale, gamma, 1 + 0.3 * random(width), random(width), EPS, low


def run(function: Callable[..., Any], arguments: tuple[Any, ...], low: torch.dtype) -> list[Tensor]:
    """Results and gradients of all floating tensors but scale."""
    given = [
        a.detach().requires_grad_(i != 2) if isinstance(a, Tensor) and a.is_floating_point() else a
        for i, a in enumerate(arguments)
    ]
    outs = function(*given)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    generator = torch.Generator("cuda").manual_seed(3)
    weights = [torch.randn(out.shape, device="cuda", generator=generator) for out in outs]
    # The normed result is the last; its gradient arrives rounded.
    grads = [*weights[:-1], weights[-1].to(low)]
    inputs = [a for a in given if isinstance(a, Tensor) and a.requires_grad]
    grads = [grad.to(out.dtype) for grad, out in zip(grads, outs, strict=True)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, grads)]


def compare(function: Callable[..., Any], plain: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    low = arguments[-1]
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments[:-1]]
    ours, theirs = run(function, arguments, low), run(plain, arguments, low)
    exact = run(plain, (*wide, torch.float64), low)
    for number, (mine, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert mine.dtype == other.dtype, number
        allowed = 2 * (other.double() - truth).norm() + torch.finfo(mine.dtype).eps * truth.norm() / 4
        assert (mine.double() - truth).norm() <= allowed, number


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("count", "width"), [(66816, 384), (66816, 768), (1023, 192), (129, 128), (7, 33), (1, 1024)])
def test_against_float64(count: int, width: int, low: torch.dtype) -> None:
    compare(norm.add_layer_norm, reference._reference, add_arguments(count, width, low))


@pytest.mark.parametrize("terms", ["scale", "gamma", "branch", ""])
def test_fewer_terms(terms: str) -> None:
    compare(norm.add_layer_norm, reference._reference, add_arguments(1000, 384, torch.bfloat16, terms))


def test_ten_runs_agree_in_every_bit() -> None:
    arguments = add_arguments(33333, 384, torch.bfloat16)
    first = run(norm.add_layer_norm, arguments, torch.bfloat16)
    for _ in range(9):
        assert all(map(torch.equal, first, run(norm.add_layer_norm, arguments, torch.bfloat16)))


def test_more_elements_than_31_bits_count() -> None:
    count, width = 2_200_000, 1024
    tokens = torch.zeros(count, width, device="cuda", dtype=torch.bfloat16)
    tokens[-3:] = torch.randn(3, width, device="cuda").bfloat16()
    weight, bias = torch.randn(2, width, device="cuda")
    last = (tokens[-3:].clone(), tokens[-3:].clone(), None)
    stream, normed = norm.add_layer_norm(tokens, tokens, None, None, weight, bias, EPS, torch.bfloat16)
    expected = norm.add_layer_norm(*last, None, weight, bias, EPS, torch.bfloat16)
    assert torch.equal(stream[-3:], expected[0])
    assert torch.equal(normed[-3:], expected[1])
    del stream, normed, expected
    normed = norm.add_layer_norm(tokens.requires_grad_(), None, None, None, weight, bias, EPS, torch.bfloat16)[1]
    (gradient,) = torch.autograd.grad(normed[-1].sum(), tokens)
    assert gradient[-1].any()
    assert not gradient[-2].any()


def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    arguments = add_arguments(1000, 384, torch.bfloat16)
    expected = norm.add_layer_norm(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = norm.add_layer_norm(*arguments)
    for tensor in found:
        tensor.zero_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.replay()
    stream.synchronize()
    assert all(map(torch.equal, found, expected))


def test_inductor_sees_no_graph_break() -> None:
    arguments = add_arguments(500, 384, torch.bfloat16, "scale")
    tokens = arguments[0].requires_grad_()

    def loss(tokens: Tensor) -> Tensor:
        stream, normed = norm.add_layer_norm(tokens, *arguments[1:])
        return stream.square().sum() + normed.float().sum()

    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(tokens), tokens)
    (expected,) = torch.autograd.grad(loss(tokens), tokens)
    torch.testing.assert_close(found, expected)


def test_opcheck() -> None:
    arguments = [
        a.requires_grad_(i != 2) if isinstance(a, Tensor) else a
        for i, a in enumerate(add_arguments(5, 32, torch.float32))
    ]
    torch.library.opcheck(torch.ops.personvit.add_layer_norm.default, arguments)
