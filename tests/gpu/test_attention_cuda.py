"""Attention kernels on a CUDA device, in every type, against a float64 oracle."""

from __future__ import annotations

import pytest
import torch

from personvit import ops
from personvit.ops import attention, backend, reference, triton_kernels

LENGTHS = (1, 19, 33, 63, 65, 127, 128, 129, 197, 256)
STEP = [(8, 129), (32, 33)]


@pytest.fixture(autouse=True)
def _kernels() -> None:
    obstacle = triton_kernels.why_not("cuda")
    if obstacle is not None:
        pytest.fail(f"{obstacle[0]}; remedy: {obstacle[1]}")


def fast(name: str):
    return backend._implementations["packed_attention", name].function


def run(function, qkv: torch.Tensor, groups, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, groups)
    (grad,) = torch.autograd.grad(out, qkv, weight.to(out.dtype))
    return out.detach(), grad


def stream(groups, head_dim: int, dtype: torch.dtype, device: str = "cuda", heads: int = 6) -> tuple[torch.Tensor, ...]:
    tokens = sum(sequences * length for sequences, length in groups)
    qkv = torch.randn(tokens, 3, heads, head_dim, device=device).to(dtype)
    return qkv, torch.randn(tokens, heads, head_dim, device=device).to(dtype)


def check(name: str, groups, head_dim: int, dtype: torch.dtype) -> None:
    qkv, weight = stream(groups, head_dim, dtype)
    truth = run(reference.packed_attention, qkv.double(), groups, weight)
    plain = run(reference.packed_attention, qkv, groups, weight)
    ours = run(fast(name), qkv, groups, weight)
    rounding = torch.finfo(dtype).eps
    for part in (lambda pair: pair[0], *(lambda pair, i=i: pair[1][:, i] for i in range(3))):  # out, dq, dk, dv
        exact, theirs, mine = (part(pair).double() for pair in (truth, plain, ours))
        assert (mine - exact).norm() <= 2 * (theirs - exact).norm() + rounding * exact.norm() / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_triton(length: int, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    check("triton", [(3, length)], head_dim, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_xformers(dtype: torch.dtype) -> None:
    obstacle = attention._why_not_xformers("cuda")
    if obstacle is not None:
        pytest.fail(f"{obstacle[0]}; remedy: {obstacle[1]}")
    check("xformers", [(3, 129), (0, 7), (5, 33)], 64, dtype)


def test_auto_takes_triton_and_repeats_its_bits() -> None:
    ops.set_backend("auto")
    qkv, weight = stream(STEP, 64, torch.bfloat16)
    first, second = (run(ops.packed_attention, qkv, STEP, weight) for _ in range(2))
    kernel = run(fast("triton"), qkv, STEP, weight)
    for a, b, c in zip(first, second, kernel, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_work_follows_the_current_stream() -> None:
    """On a stream that is busy, the kernel must wait for what was queued before it there."""
    qkv, weight = stream(STEP, 64, torch.bfloat16)
    expected = run(fast("triton"), qkv, STEP, weight)
    late = torch.zeros_like(qkv)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(qkv)
        found = run(fast("triton"), late, STEP, weight)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_graph_gives_the_bits_of_eager() -> None:
    qkv, weight = stream(STEP, 64, torch.bfloat16)
    static, above = torch.zeros_like(qkv).requires_grad_(), torch.zeros_like(weight)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        out = fast("triton")(static, STEP)
        return out, torch.autograd.grad(out, static, above)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles, which a capture forbids
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad = step()
    with torch.no_grad():
        static.copy_(qkv)
        above.copy_(weight)
    graph.replay()
    expected = run(fast("triton"), qkv, STEP, weight)
    assert torch.equal(out, expected[0])
    assert torch.equal(grad, expected[1])


def test_runs_on_the_device_of_its_tensors() -> None:
    """Whichever device is current."""
    device = f"cuda:{torch.cuda.device_count() - 1}"
    qkv, weight = stream(STEP, 64, torch.bfloat16, device=device)
    with torch.cuda.device(0):
        out, grad = run(fast("triton"), qkv, STEP, weight)
    assert str(out.device) == str(grad.device) == device
    truth = run(reference.packed_attention, qkv.float(), STEP, weight)
    torch.testing.assert_close(out.float(), truth[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(grad.float(), truth[1], atol=5e-2, rtol=5e-2)


def test_compiled_by_inductor() -> None:
    qkv, weight = stream(STEP, 64, torch.bfloat16)
    compiled = torch.compile(lambda x, groups: fast("triton")(x, groups), fullgraph=True)
    found, expected = run(compiled, qkv, STEP, weight), run(fast("triton"), qkv, STEP, weight)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
