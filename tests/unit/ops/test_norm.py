from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from personvit import ops
from personvit.ops import backend, triton_kernels

EPS = 1e-6


def arguments() -> dict[str, Tensor]:
    return {
        "tokens": torch.randn(6, 32),
        "branch": torch.randn(6, 32),
        "scale": torch.tensor([1.25, 0.0, 1.25, 1.25, 0.0, 1.25]),
        "gamma": torch.randn(32),
        "weight": torch.randn(32),
        "bias": torch.randn(32),
    }


def add(given: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    return ops.add_layer_norm(*given.values(), EPS, dtype)


def test_sum_and_norm() -> None:
    given = arguments()
    stream, normed = add(given)
    expected = given["tokens"] + given["scale"][:, None] * given["gamma"] * given["branch"]
    torch.testing.assert_close(stream, expected)
    assert torch.equal(normed, F.layer_norm(stream, (32,), given["weight"], given["bias"], EPS))
    assert torch.equal(stream[1], given["tokens"][1])  # dropped


def test_without_factors_and_without_a_branch() -> None:
    given = arguments() | {"scale": None, "gamma": None}
    assert torch.equal(add(given)[0], given["tokens"] + given["branch"])
    stream, normed = add(given | {"branch": None})
    assert stream is given["tokens"]
    assert torch.equal(normed, F.layer_norm(stream, (32,), given["weight"], given["bias"], EPS))


@pytest.mark.parametrize("branch", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factors", [True, False])
def test_types(branch: torch.dtype, factors: bool) -> None:
    given = arguments()
    given["branch"] = given["branch"].to(branch)
    if not factors:
        given |= {"scale": None, "gamma": None}
    stream, normed = add(given)
    assert (stream.dtype, normed.dtype) == (torch.float32, torch.float32)
    assert add(given, torch.float16)[1].dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        stream, normed = add(given)
        assert (stream.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    low = given | {"tokens": given["tokens"].bfloat16()}
    stream, normed = add(low)
    assert (stream.dtype, normed.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.randn(2, 3, 32)}, r"\[T, D\], got \[2, 3, 32\]"),
        ({"branch": torch.randn(5, 32)}, r"branch \[5, 32\]"),
        ({"scale": torch.rand(6, 1)}, r"scale \[6, 1\]"),
        ({"branch": None}, "got no branch"),
        ({"branch": None, "scale": None}, "gamma multiplies a branch"),
        ({"gamma": torch.randn(6)}, r"gamma \[6\]"),
        ({"weight": torch.randn(6)}, r"weight \[6\]"),
        ({"bias": torch.randn(1, 32)}, r"bias \[1, 32\]"),
    ],
)
def test_shapes_are_checked(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add(arguments() | change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, tests/gpu covers this")
@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_compiles_without_graph_breaks(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()  # a compiled function keeps the choice of its first call
    assert triton_kernels.why_not("cpu") is None
    monkeypatch.setattr(backend, "_mode", mode)
    monkeypatch.setattr(backend, "_chosen", {})
    given = arguments()
    leaves = [tensor.requires_grad_() for name, tensor in given.items() if name != "scale"]

    def loss(tokens: Tensor, branch: Tensor, scale: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        tokens, normed = ops.add_layer_norm(tokens, None, None, None, weight, bias, EPS)
        tokens, normed = ops.add_layer_norm(tokens, normed * branch, scale, gamma, weight, bias, EPS)
        tokens, normed = ops.add_layer_norm(tokens, normed * branch, None, None, weight, bias, EPS)
        return tokens.square().sum() + normed.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*given.values()), leaves)
    monkeypatch.setattr(backend, "_mode", "reference")
    backend._chosen.clear()
    for a, b in zip(found, torch.autograd.grad(loss(*given.values()), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.float16):
        normed = torch.compile(
            lambda tokens, weight, bias: ops.add_layer_norm(tokens, None, None, None, weight, bias, EPS)[1],
            fullgraph=True,
            backend="aot_eager",
        )(given["tokens"], given["weight"], given["bias"])
    assert normed.dtype == torch.float16
