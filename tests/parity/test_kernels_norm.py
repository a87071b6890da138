"""The Triton kernels of the norms in the interpreter, against a float64 oracle and plain torch in the same types."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from personvit.errors import UnsupportedInputError
from personvit.kernels import norm, rows
from personvit.ops import norm as reference

if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, tests/gpu compares them", allow_module_level=True)

EPS = 1e-6
KINDS = {
    # types of stream, branch and result, parameters
    "fp32": (torch.float32, torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16, torch.float16),
    "fp16 under an fp32 stream": (torch.float32, torch.float16, torch.float32),
}
TERMS = ["scale gamma", "scale", "gamma", "branch", ""]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody writes shows up as NaN, and few programs take several tiles each."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: fill(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: fill(empty_like(*args, **kwargs)))
    monkeypatch.setattr(rows, "RESIDENT_WARPS", 3 * rows.WARPS)


def compare(function: Callable[..., Any], plain: Callable[..., Any], *arguments: Any) -> None:
    """Results and gradients of `function` err at most twice as much as those of `plain`."""
    names, ours = run(function, arguments)
    _, theirs = run(plain, arguments)
    # The last argument is the type of the result.
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments[:-1]]
    _, exact = run(plain, (*wide, torch.float64), like=ours)
    for name, mine, other, truth in zip(names, ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype, name
        assert mine.shape == truth.shape, name
        # Where plain torch happens to be exact, one rounding of the result is still allowed.
        allowed = 2 * (other.double() - truth).norm() + torch.finfo(mine.dtype).eps * truth.norm() / 4
        assert (mine.double() - truth).norm() <= allowed, name


def run(
    function: Callable[..., Any], arguments: tuple[Any, ...], like: list[Tensor] | None = None
) -> tuple[list[str], list[Tensor]]:
    """Results, then gradients of all floating tensors but scale, of a sum with fixed weights."""
    given = [
        a.detach().requires_grad_(i != 2) if isinstance(a, Tensor) and a.is_floating_point() else a
        for i, a in enumerate(arguments)
    ]
    outs = function(*given)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(out.shape, generator=generator) for out in outs]
    # The weights as they are rounded in the precision under test, for the oracle too.
    types = [out.dtype for out in (like or outs)[: len(outs)]]
    grads = [w.to(kind).to(out.dtype) for w, kind, out in zip(weights, types, outs, strict=True)]
    inputs = [a for a in given if isinstance(a, Tensor) and a.requires_grad]
    names = [f"output {i}" for i in range(len(outs))] + [f"gradient {i}" for i in range(len(inputs))]
    return names, [*(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, grads)]


def parameters(width: int, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(width).to(kind), (1 + 0.3 * torch.randn(width)).to(kind), torch.randn(width).to(kind)


def add_arguments(count: int, width: int, kind: str, terms: str) -> tuple[Any, ...]:
    stream, low, vectors = KINDS[kind]
    gamma, weight, bias = parameters(width, vectors)
    tokens = (2 * torch.randn(count, width) + 0.5).to(stream)
    branch = torch.randn(count, width).to(low) if terms else None
    scale = (torch.rand(count) < 0.8).float() / 0.8 if "scale" in terms else None
    return tokens, branch, scale, gamma if "gamma" in terms else None, weight, bias, EPS, low


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "width"), [(70, 32), (40, 128), (20, 192), (19, 384), (9, 768), (1, 1024), (8, 33)])
def test_add_layer_norm(count: int, width: int, kind: str) -> None:
    compare(norm.add_layer_norm, reference._reference, *add_arguments(count, width, kind, "scale gamma"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("terms", TERMS)
def test_add_layer_norm_with_fewer_terms(terms: str, kind: str) -> None:
    compare(norm.add_layer_norm, reference._reference, *add_arguments(11, 384, kind, terms))


def test_no_tokens() -> None:
    for terms in TERMS:
        _, found = run(norm.add_layer_norm, add_arguments(0, 32, "fp32", terms))
        assert found[1].shape == (0, 32)
        assert all(not gradient.any() for gradient in found[2:])


def test_the_stream_without_a_branch_is_the_tokens() -> None:
    tokens, *others = add_arguments(3, 32, "fp32", "")
    assert norm.add_layer_norm(tokens, *others)[0] is tokens


@pytest.mark.parametrize("which", ["stream", "normed"])
def test_gradient_of_one_result(which: str) -> None:
    def one(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(*arguments)[which == "normed"]

    arguments = add_arguments(5, 48, "fp32", "gamma")
    if which == "normed":
        compare(one(norm.add_layer_norm), one(reference._reference), *arguments)
        return
    tokens, branch, gamma = (arguments[i].requires_grad_() for i in (0, 1, 3))
    stream = norm.add_layer_norm(*arguments)[0]
    found = torch.autograd.grad(stream.sum(), (tokens, branch, gamma))
    expected = torch.ones_like(tokens), gamma.expand_as(branch), branch.sum(0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("count", "width"), [(300, 40), (1, 16), (0, 16), (40, 4100)])
def test_sum_partials(count: int, width: int) -> None:
    partials = torch.randn(2, count, width)
    torch.testing.assert_close(rows.sum_partials(partials), partials.sum(1), rtol=1e-5, atol=1e-5)


def test_scale_may_start_anywhere() -> None:
    arguments = list(add_arguments(11, 48, "fp32", "scale"))
    arguments[2] = torch.rand(4, 11)[1]  # 44 bytes into its memory
    compare(norm.add_layer_norm, reference._reference, *arguments)


def test_two_runs_agree_in_every_bit() -> None:
    arguments = add_arguments(70, 128, "fp16 under an fp32 stream", "scale gamma")
    (_, first), (_, second) = run(norm.add_layer_norm, arguments), run(norm.add_layer_norm, arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("count", [5, 0])
@pytest.mark.parametrize("terms", ["scale gamma", "branch", ""])
def test_opcheck_add_layer_norm(count: int, terms: str) -> None:
    arguments = [
        a.requires_grad_(i != 2) if isinstance(a, Tensor) else a
        for i, a in enumerate(add_arguments(count, 32, "fp32", terms))
    ]
    torch.library.opcheck(torch.ops.personvit.add_layer_norm.default, arguments)


def test_opcheck_backward() -> None:
    wide, tall, vector = torch.randn(5, 32), torch.rand(5), torch.randn(32)
    arguments = (wide, wide, wide, wide, tall, vector, vector, tall, tall, torch.float16)
    torch.library.opcheck(torch.ops.personvit.add_layer_norm_backward.default, arguments)


def spoil(arguments: tuple[Any, ...], place: int, value: Any) -> list[Any]:
    return [value if i == place else a for i, a in enumerate(arguments)]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(32, 6).t(), "strides"),
        (0, torch.randn(6, 32, dtype=torch.float64), "float64"),
        (0, torch.randn(6, 32, device="meta"), "on meta"),
        (4, torch.randn(32, device="meta"), "on meta"),
        (0, torch.randn(2, 3, 32), r"\[2, 3, 32\]"),
        (0, torch.randn(6, 4000), "D from 1 to"),
        (1, torch.randn(5, 32), r"branch of shape \[5, 32\]"),
        (1, None, "there is none"),
        (2, torch.rand(5), r"scale \[5\]"),
        (2, torch.rand(6).half(), r"scale \[6\] torch.float16"),
        (2, torch.rand(12)[::2], r"strides \[2\]"),
        (2, torch.rand(6, device="meta"), "several devices"),
        (3, torch.randn(31), r"gamma of shape \[31\]"),
        (4, torch.randn(1), r"weight of shape \[1\]"),
        (7, torch.float64, "float64 was asked for"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(place: int, value: Any, message: str) -> None:
    arguments = spoil(add_arguments(6, 32, "fp32", "scale gamma"), place, value)
    reason, remedy = norm.refuses_add_layer_norm(*arguments)
    assert re.search(message, reason)
    assert remedy
    if not any(isinstance(a, Tensor) and a.is_meta for a in arguments):  # those find only shapes
        with pytest.raises(UnsupportedInputError, match=message):
            norm.add_layer_norm(*arguments)
