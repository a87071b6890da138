"""Token assembly, residual sum + LayerNorm, and the choice of rows: fused against what PyTorch offers.

python benchmarks/bench_tokens.py                 on a GPU: the shapes of a step of 128 images, ViT-S and ViT-B
python benchmarks/bench_tokens.py --warm          inputs may lie in the L2 cache (default: it is overwritten first)
python benchmarks/bench_tokens.py --no-compile    without the torch.compile baseline

Baselines: the same work in plain torch, as the model did it before these operators (where, cat, add; add, layer_norm;
index_select, whose backward fills with zeros and adds), and torch.compile of that. The floor is the bytes that must
move, each once, at the rate of a large copy. Parity with float64 is checked first. Rows are appended to
benchmarks/results/tokens.jsonl; on a CPU, with tiny shapes, to tokens_cpu.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from personvit import ops

EPS = 1e-6
LOW = torch.bfloat16
"""Of patches, branches and what the norms give; the stream is float32, as under autocast."""
MODELS = {"ViT-S": 384, "ViT-B": 768}
IMAGES = {"cuda": 128, "cpu": 2}
GLOBALS, LOCALS = (2, 128), (8, 32)
"""Crops of an image, and patches of each."""
MASKED = 4900 / 128
"""Masked patches of an image: iBOT masks half of the crops, at a ratio around 0.3."""


@dataclass(frozen=True)
class Case:
    """One operator at one shape."""

    op: str
    model: str
    shape: list[int]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: list[Tensor]
    """Those with gradients are leaves."""
    forward_bytes: float
    """What must be read and written, each once."""
    backward_bytes: float


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def plain_assemble(a: Tensor, b: Tensor, mask: Tensor, embed: Tensor, cls: Tensor, *positions: Tensor) -> Tensor:
    crops = []
    for tokens, chosen, table in zip((a, b), (mask, None), positions, strict=True):
        if chosen is not None:
            tokens = torch.where(chosen.unsqueeze(-1), embed.to(tokens.dtype), tokens)
        first = (cls + table[:1]).expand(len(tokens), 1, -1)
        crops.append(torch.cat([first, tokens + table[1:]], dim=1).flatten(0, 1))
    return torch.cat(crops)


def fused_assemble(a: Tensor, b: Tensor, mask: Tensor, embed: Tensor, cls: Tensor, *positions: Tensor) -> Tensor:
    return ops.assemble_tokens([a, b], [mask, None], embed, cls, positions)


def low_type(tokens: Tensor) -> torch.dtype:
    """Type of a norm's result: that of the oracle stays float64."""
    return LOW if tokens.dtype == torch.float32 else tokens.dtype


def plain_add(tokens: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    tokens = torch.addcmul(tokens, branch, scale.unsqueeze(-1))
    return tokens, F.layer_norm(tokens, weight.shape, weight, bias, EPS).to(low_type(tokens))


def fused_add(tokens: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return ops.add_layer_norm(tokens, branch, scale, None, weight, bias, EPS, low_type(tokens))


def plain_gather(tokens: Tensor, rows: Tensor) -> Tensor:
    return tokens.index_select(0, rows)


def cases(model: str, images: int, device: str) -> list[Case]:
    """The three operators at the shapes of a step."""
    width = MODELS[model]

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    resolutions = [(count * images, patches) for count, patches in (GLOBALS, LOCALS)]
    patches = [leaf(*shape, width, dtype=LOW) for shape in resolutions]
    positions = [leaf(1 + length, width) for _, length in resolutions]
    mask = torch.rand(*resolutions[0], device=device) < MASKED / (GLOBALS[0] * GLOBALS[1])
    embed, cls, weight, bias = leaf(width), leaf(width), leaf(width), leaf(width)
    total = sum(count * (1 + length) for count, length in resolutions)
    tokens, branch = leaf(total, width), leaf(total, width, dtype=LOW)
    scale = (torch.rand(total, device=device) < 0.9) / 0.9
    chosen = round(images * (GLOBALS[0] + LOCALS[0] + MASKED))
    rows = torch.randperm(total, device=device)[:chosen]
    flat = sum(p.numel() for p in patches)
    moved = flat * 2 + mask.numel() + total * width * 4
    stream = total * width
    return [
        Case(
            "assemble_tokens", model, [images, total, width], fused_assemble, plain_assemble,
            [*patches, mask, embed, cls, *positions], moved, moved,
        ),
        Case(
            "add_layer_norm", model, [total, width], fused_add, plain_add, [tokens, branch, scale, weight, bias],
            stream * (4 + 2 + 4 + 2), stream * (4 + 2 + 4 + 4 + 2),  # d stream, d normed, stream; d tokens, d branch
        ),
        Case(
            "gather_rows", model, [total, chosen, width], ops.gather_rows, plain_gather, [tokens, rows],
            chosen * width * (4 + 4), chosen * width * 4 + stream * 4,
        ),
    ]  # fmt: skip


def both_ways(function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward: gradients of all leaves."""
    results = outputs(function(*inputs))
    return torch.autograd.grad(results, [t for t in inputs if t.requires_grad], grads)


def check_parity(case: Case) -> None:
    """Stop unless results and gradients err at most twice as much as plain torch against float64."""
    generator = torch.Generator(case.inputs[0].device).manual_seed(0)
    weights: list[Tensor] = []

    def everything(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
        results = outputs(function(*inputs))
        if not weights:
            weights.extend(torch.randn(r.shape, device=r.device, generator=generator).to(r.dtype) for r in results)
        return [*results, *both_ways(function, inputs, [w.to(r.dtype) for w, r in zip(weights, results, strict=True)])]

    wide = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in case.inputs]
    ours, theirs = everything(case.ours, case.inputs), everything(case.plain, case.inputs)
    for mine, other, truth in zip(ours, theirs, everything(case.plain, wide), strict=True):
        allowed = 2 * (other.double() - truth).norm() + torch.finfo(mine.dtype).eps * truth.norm() / 4
        error = (mine.double() - truth).norm()
        if not error <= allowed:
            raise SystemExit(f"parity: {case.op} is {error:.1e} off float64, allowed are {allowed:.1e}")


class Table:
    """Measures a case, prints its lines, keeps its rows."""

    def __init__(self, options: argparse.Namespace, rate: float) -> None:
        self.options = options
        self.rate = rate
        self.backends = {row.op: row.backend for row in ops.report(options.device.partition(":")[0])}
        self.rows: list[dict[str, Any]] = []
        print(
            f"\ncopying here {rate / 1e9:.0f} GB/s read and written; floor: the bytes that must move, at that rate\n\n"
            f"{'operator':<20}{'model':<7}{'work':<10}{'eager':>10}{'compiled':>10}"
            f"{'ours p20':>10}{'p50':>10}{'p80':>10}{'/eager':>8}{'/stock':>8}{'floor':>10}{'share':>7}"
        )

    def add(self, case: Case) -> None:
        """Two lines: forward, and forward with backward."""
        grads = [torch.randn_like(result) for result in outputs(case.plain(*case.inputs))]
        ways = {"eager": case.plain, "ours": case.ours}
        if self.options.compile:
            torch.compiler.reset()
            ways["compile"] = torch.compile(case.plain, fullgraph=True, dynamic=False)
        for work in ("forward", "both"):
            floor = (case.forward_bytes + (case.backward_bytes if work == "both" else 0.0)) / self.rate
            measured = {name: self._measure(function, case, grads, work) for name, function in ways.items()}
            self._line(case, work, floor, measured)
            backends = {"ours": self.backends[case.op]}
            for name, measurement in measured.items():
                more = {"model": case.model, "cold": self.options.cold, "floor_s": floor, "copy_rate": self.rate}
                dtype = "bfloat16 in a float32 stream"
                op = f"{case.op} {work}"
                self.rows.append(
                    harness.row(op, backends.get(name, name), case.shape, measurement, dtype=dtype, **more)
                )

    def _measure(self, function: Callable[..., Any], case: Case, grads: list[Tensor], work: str) -> harness.Measurement:
        def forward() -> Any:
            with torch.no_grad():
                return function(*case.inputs)

        run = forward if work == "forward" else lambda: both_ways(function, case.inputs, grads)
        return harness.measure_device(run, self.options.device, cold=self.options.cold)

    def _line(self, case: Case, work: str, floor: float, measured: dict[str, harness.Measurement]) -> None:
        eager, ours, compiled = measured["eager"], measured["ours"], measured.get("compile")
        stock = min(m.at(50) for m in (eager, compiled) if m is not None)
        times = [eager.at(50), None if compiled is None else compiled.at(50), *(ours.at(p) for p in (20, 50, 80))]
        print(
            f"{case.op:<20}{case.model:<7}{work:<10}"
            + "".join(f"{'' if t is None else microseconds(t):>10}" for t in times)
            + f"{eager.at(50) / ours.at(50):7.2f}x{stock / ours.at(50):7.2f}x{microseconds(floor):>10}"
            f"{100 * floor / ours.at(50):6.0f}%",
            flush=True,
        )


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} us"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)} (default %(default)s)")
    parser.add_argument("--warm", dest="cold", action="store_false", help="leave the L2 cache as the call before did")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = options.models.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"--models {','.join(unknown)}: expected some of {', '.join(MODELS)}")
    kind = options.device.partition(":")[0]
    torch.manual_seed(options.seed)
    harness.announce(options.device)
    for name in names:
        for case in cases(name, 2, options.device):
            check_parity(case)
    print("parity with float64: good")
    table = Table(options, harness.copy_rate(options.device))
    for name in names:
        for case in cases(name, IMAGES[kind], options.device):
            table.add(case)
    path = harness.append_rows("tokens" if kind == "cuda" else "tokens_cpu", table.rows, options.device)
    print(f"\n{len(table.rows)} rows appended to {path.relative_to(harness.ROOT)}")


if __name__ == "__main__":
    main()
