"""Attention of short sequences: our kernels against eager PyTorch and every stock kernel, one table.

python benchmarks/bench_attention.py            ViT-S and ViT-B, 64 to 256 images, 129, 33, 197 and 19 tokens
python benchmarks/bench_attention.py --quick    64 images of ViT-S only

A row is one layer's attention of one step: two global crops (129 or 197 tokens) or eight local crops (33 or 19) of each
image, head dimension 64. Times are of the device, with a cold L2 cache (as in a step, where a layer's weights and
activations pass in between) and a warm one. `floor` is the share of the least time that moving the bytes or computing
the products would take at the rates measured here. A backend that is off the float64 oracle is not measured; leaves
with 1 if that is ours. Without a GPU: tiny shapes, to show that it runs; rows go to attention_cpu.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from personvit.ops import backend, reference

Groups = list[tuple[int, int]]
Attention = Callable[[Tensor, Groups], Tensor]

HEAD_DIM = 64
CROPS = {129: 2, 33: 8, 197: 2, 19: 8}
"""Crops of an image by tokens of a crop: 256x128, 128x64, 224x224 and 96x48 pixels."""
HEADS = {"ViT-S": 6, "ViT-B": 12}
OURS = "triton"
EAGER = "eager"
STOCK = ("sdpa", "xformers")


class Case(NamedTuple):
    """One layer's attention."""

    model: str
    images: int
    length: int

    @property
    def groups(self) -> Groups:
        """The packed stream."""
        return [(self.images * CROPS[self.length], self.length)]

    @property
    def heads(self) -> int:
        return HEADS[self.model]

    def stream(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        """qkv and a gradient of the output."""
        ((sequences, length),) = self.groups
        qkv = torch.randn(sequences * length, 3, self.heads, HEAD_DIM, device=device).to(dtype)
        return qkv, torch.randn_like(qkv[:, 0])


class Rates(NamedTuple):
    """What this machine reaches, per second."""

    bytes: float
    flops: float


def eager(qkv: Tensor, groups: Groups) -> Tensor:
    """The usual code of timm and iBOT: two products and a softmax, in the type of the input."""
    ((sequences, length),) = groups
    heads = qkv.shape[2]
    q, k, v = qkv.view(sequences, length, 3, heads, HEAD_DIM).permute(2, 0, 3, 1, 4)  # each [S, H, N, Dh]
    weights = (q @ k.transpose(-2, -1) * HEAD_DIM**-0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(qkv.shape[0], heads, HEAD_DIM)


def implementation(name: str) -> Attention:
    return next(i.function for i in backend.implementations("packed_attention") if i.backend == name)


def restricted(kernel: SDPBackend) -> Attention:
    """scaled_dot_product_attention with one kernel of torch's."""

    def attend(qkv: Tensor, groups: Groups) -> Tensor:
        with sdpa_kernel(kernel):
            return implementation("sdpa")(qkv, groups)

    return attend


def contestants(device: str) -> dict[str, Attention]:
    """Backends by name; on a GPU, those that can load."""
    if device == "cpu":
        return {EAGER: eager, "reference": implementation("reference"), "sdpa": implementation("sdpa")}
    found = {
        EAGER: eager,
        "sdpa-flash": restricted(SDPBackend.FLASH_ATTENTION),
        "sdpa-cudnn": restricted(SDPBackend.CUDNN_ATTENTION),
        "sdpa-efficient": restricted(SDPBackend.EFFICIENT_ATTENTION),
    }
    for candidate in backend.implementations("packed_attention"):
        if candidate.backend in ("xformers", OURS):
            obstacle = candidate.why_not("cuda")
            if obstacle is None:
                found[candidate.backend] = candidate.function
            else:
                print(f"{candidate.backend} is left out: {obstacle[0]}; remedy: {obstacle[1]}")
    return found


def gradients(function: Attention, qkv: Tensor, groups: Groups, above: Tensor) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, groups)
    (grad,) = torch.autograd.grad(out, qkv, above.to(out.dtype))
    return out.detach(), grad


def fault(function: Attention, case: Case, dtype: torch.dtype, device: str) -> str | None:
    """What is wrong with a backend on a few sequences of a case; None if it is as exact as twice plain torch."""
    small = case._replace(images=1)
    qkv, above = small.stream(dtype, device)
    try:
        mine = gradients(function, qkv, small.groups, above)
    except (RuntimeError, ValueError) as error:  # a stock kernel that does not take these shapes here
        return f"does not run: {str(error).splitlines()[0]}"
    truth = gradients(reference.packed_attention, qkv.double(), small.groups, above)
    plain = gradients(reference.packed_attention, qkv, small.groups, above)
    for what, a, b, exact in zip(("output", "gradient"), mine, plain, truth, strict=True):
        allowed = 2 * (b.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm() / 4
        error = (a.double() - exact).norm()
        if not error <= allowed:
            return (
                f"its {what} is {error / exact.norm():.1e} off the float64 oracle, allowed {allowed / exact.norm():.1e}"
            )
    return None


def works(function: Attention, qkv: Tensor, groups: Groups, above: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "forward", lambda: function(qkv, groups)
    yield "forward+backward", lambda: gradients(function, qkv, groups, above)


def floor(case: Case, work: str, element: int, rates: Rates) -> float:
    """Seconds for the bytes that must move, or for the products if they take longer.

    Forward: q, k, v and the output; 4 N^2 Dh FLOP. Backward: q, k, v and the gradient above, three gradients; 10 N^2 Dh
    FLOP, with the probabilities computed again.
    """
    ((sequences, length),) = case.groups
    items = sequences * case.heads
    tensors, products = (4, 4) if work == "forward" else (4 + 7, 4 + 10)
    moved = items * tensors * length * HEAD_DIM * element
    return max(moved / rates.bytes, items * products * length**2 * HEAD_DIM / rates.flops)


def measure_case(
    case: Case, backends: dict[str, Attention], dtype: torch.dtype, device: str, rates: Rates
) -> list[dict[str, Any]]:
    """Measure and print the rows of a case."""
    qkv, above = case.stream(dtype, device)
    shape = list(qkv.shape)
    rows = []
    for work in ("forward", "forward+backward"):
        least = floor(case, work, qkv.element_size(), rates)
        for cold in (True, False):
            times = {}
            for name, function in backends.items():
                run = dict(works(function, qkv, case.groups, above))[work]
                with torch.no_grad() if work == "forward" else contextlib.nullcontext():
                    times[name] = harness.measure_device(run, device, cold=cold)
            stock = min((m.at(50) for name, m in times.items() if name.startswith(STOCK)), default=None)
            for name, measured in times.items():
                facts = {
                    "model": case.model,
                    "images": case.images,
                    "tokens": case.length,
                    "cold": cold,
                    "floor_s": least,
                    "byte_rate": rates.bytes,
                    "flop_rate": rates.flops,
                }
                kind = str(dtype).removeprefix("torch.")
                rows.append(harness.row(f"attention {work}", name, shape, measured, dtype=kind, **facts))
                ratio = times[EAGER].at(50) / measured.at(50) if EAGER in times else float("nan")
                best = f"{stock / measured.at(50):>8.2f}" if stock is not None else f"{'-':>8}"
                quantiles = "".join(f"{1e6 * measured.at(p):>10.1f}" for p in (20, 50, 80))
                cache = "cold" if cold else "warm"
                where = f"{case.model} {case.images:>4} {case.length:>4} {work:<17}{cache:<5} {name:<15}"
                print(
                    f"{where}{quantiles}{ratio:>8.2f}{best}{least / measured.at(50):>8.0%}",
                    flush=True,
                )
    return rows


def cases(options: argparse.Namespace) -> list[Case]:
    if options.device == "cpu":
        return [Case("ViT-S", 1, length) for length in (129, 33)]
    images = (64,) if options.quick else (64, 128, 256)
    models = ("ViT-S",) if options.quick else tuple(HEADS)
    return [Case(model, count, length) for model in models for count in images for length in CROPS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 images of ViT-S only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    harness.announce(options.device)
    backends = contestants(options.device)
    failed = OURS not in backends and on_gpu
    size = 8192 if on_gpu else 512
    rates = Rates(harness.copy_rate(options.device), harness.matmul_rate(size, size, size, options.device, dtype=dtype))
    print(f"rates measured here: {rates.bytes / 1e9:.0f} GB/s copied, {rates.flops / 1e12:.2f} TFLOP/s {dtype}")
    print("microseconds; ratios of medians: eager / this, best stock kernel / this, floor / this")
    columns = "".join(f"{name:>10}" for name in ("p20", "p50", "p80"))
    print(f"model  imgs  len work             cache backend        {columns}   eager   stock   floor")
    rows = []
    for case in cases(options):
        fit = {}
        for name, function in backends.items():
            wrong = fault(function, case, dtype, options.device)
            if wrong is None:
                fit[name] = function
                continue
            print(f"{case.model} {case.length} tokens: {name} is left out: {wrong}")
            failed = failed or name == OURS
        rows += measure_case(case, fit, dtype, options.device, rates)
    path = harness.append_rows("attention" if on_gpu else "attention_cpu", rows, options.device)
    print(f"\n{len(rows)} rows appended to {path.relative_to(harness.ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
