"""Distillation cross entropy, forward and backward: the CLS and patch losses of a step against what PyTorch offers.

python benchmarks/bench_losses.py                 on a GPU: the logits of a step of 128 images
python benchmarks/bench_losses.py --warm          inputs may lie in the L2 cache (default: it is overwritten first)
python benchmarks/bench_losses.py --no-compile    without the torch.compile baseline

Baselines: "eager", the published code (bytedance/ibot main_ibot.py), a softmax per teacher crop and a log-softmax per
pair of crops, 18 for 2 + 8 crops; "one pass", the operator's reference in plain torch, a log-softmax per student row;
and torch.compile of that. All also sum up the teacher's columns, for the centre. The floor is the bytes that must move
(student and teacher read once, the gradient written once) at the rate of a large copy. Parity with float64 is checked
first. Rows are appended to benchmarks/results/losses.jsonl; on a CPU, with tiny shapes, to losses_cpu.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from personvit import ops
from personvit.ops import backend

OPERATOR = "distill_cross_entropy"
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
LOW = torch.bfloat16
"""Of the logits, as under autocast."""
Loss = Callable[..., tuple[Tensor, Tensor]]


class Scale(NamedTuple):
    """Logits of a step: images (for patches: masked patches), views of each, crops that the teacher sees, width."""

    images: int
    views: int
    crops: int
    width: int

    @property
    def moved(self) -> int:
        """Bytes that must move, each once."""
        return (2 * self.views + self.crops) * self.images * self.width * 2


SCALES = {
    "cuda": {"CLS": Scale(128, 10, 2, 65536), "CLS 8k": Scale(128, 10, 2, 8192), "patch": Scale(4900, 1, 1, 8192)},
    "cpu": {"CLS": Scale(2, 10, 2, 4096), "CLS 8k": Scale(2, 10, 2, 512), "patch": Scale(40, 1, 1, 512)},
}
PARITY = {"CLS": Scale(3, 10, 2, 65536), "CLS 8k": Scale(3, 10, 2, 8192), "patch": Scale(19, 1, 1, 8192)}


def pair_loop(
    student: Tensor,
    teacher: Tensor,
    offset: Tensor,
    student_temp: float,
    teacher_temp: float,
    images: int,
    exclude_own: bool,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As published: one cross entropy per pair of a teacher crop and a student view."""
    targets = ((teacher.float() - offset) / teacher_temp).softmax(dim=-1).detach().split(images)
    views = (student.float() / student_temp).split(images)
    factors = [1.0] * len(views) if weights is None else weights.split(images)
    terms = [
        (torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1) * factor).sum()
        for q, target in enumerate(targets)
        for v, (view, factor) in enumerate(zip(views, factors, strict=True))
        if v != q or not exclude_own
    ]
    return torch.stack(terms).sum(), teacher.float().sum(dim=0)


def arguments(scale: Scale, device: str, dtype: torch.dtype = LOW) -> list[Any]:
    """What the operator takes; the student is a leaf."""
    rows = scale.images * scale.views
    student = torch.randn(rows, scale.width, device=device).to(dtype).requires_grad_()
    teacher = torch.randn(scale.images * scale.crops, scale.width, device=device).to(dtype)
    offset = 0.1 * torch.randn(scale.width, device=device)
    patches = scale.views == 1
    weights = torch.rand(rows, device=device) if patches else None
    return [student, teacher, offset, STUDENT_TEMP, TEACHER_TEMP, scale.images, not patches, weights]


def both_ways(function: Loss, given: list[Any]) -> tuple[Tensor, ...]:
    """Loss, column sums, and the student's gradient."""
    loss, column_sum = function(*given)
    return loss.detach(), column_sum, *torch.autograd.grad(loss, given[0])


def reference() -> Loss:
    """The operator in plain torch."""
    function: Loss = backend.implementations(OPERATOR)[0].function
    return function


def check_parity(scale: Scale, device: str, dtype: torch.dtype) -> None:
    """Stop unless results and gradient err at most twice as much as plain torch against float64."""
    given = arguments(scale, device, dtype)
    wide = [a.detach().double() if isinstance(a, Tensor) else a for a in given]
    wide[0].requires_grad_()
    ours, theirs = both_ways(ops.distill_cross_entropy, given), both_ways(pair_loop, given)
    for name, mine, other, truth in zip(
        ("loss", "column sums", "gradient"), ours, theirs, both_ways(reference(), wide), strict=True
    ):
        # Plain torch may be right by chance: a rounding of the result is allowed, a whole one where it is one number.
        rounding = torch.finfo(mine.dtype).eps / (2 if name == "loss" else 4)
        allowed = 2 * (other.double() - truth).norm() + rounding * truth.norm()
        error = (mine.double() - truth).norm()
        if not error <= allowed:
            raise SystemExit(f"parity: {name} of {list(scale)} is {error:.1e} off float64, allowed are {allowed:.1e}")


def measure(name: str, scale: Scale, options: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    """Print a line for each way to compute a loss; the rows of results."""
    given = arguments(scale, options.device)
    ways: dict[str, Loss] = {"eager": pair_loop, "one pass": reference()}
    if options.compile:
        torch.compiler.reset()
        ways["compile"] = torch.compile(reference(), fullgraph=True, dynamic=False)
    chosen = backend.choose(OPERATOR, options.device.partition(":")[0])
    if chosen != "reference":
        ways[chosen] = ops.distill_cross_entropy
    measured = {
        way: harness.measure_device(lambda f=function: both_ways(f, given), options.device, cold=options.cold)
        for way, function in ways.items()
    }
    floor = scale.moved / rate
    stock = min(m.at(50) for way, m in measured.items() if way != chosen)
    shape = [scale.images, scale.views, scale.crops, scale.width]
    rows = []
    for way, m in measured.items():
        peak = "?" if m.peak_bytes is None else f"{m.peak_bytes / 2**30:.2f}"
        print(
            f"{name:<8}{'x'.join(map(str, shape)):<18}{way:<10}"
            + "".join(f"{milliseconds(m.at(p)):>11}" for p in (20, 50, 80))
            + f"{measured['eager'].at(50) / m.at(50):8.2f}x{stock / m.at(50):7.2f}x"
            f"{milliseconds(floor):>11}{100 * floor / m.at(50):6.0f}%{peak:>8}",
            flush=True,
        )
        more = {"cold": options.cold, "floor_s": floor, "copy_rate": rate}
        rows.append(harness.row(f"{OPERATOR} {name}", way, shape, m, dtype="bfloat16", **more))
    return rows


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", dest="cold", action="store_false", help="leave the L2 cache as the call before did")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kind = options.device.partition(":")[0]
    torch.manual_seed(options.seed)
    harness.announce(options.device)
    for scale in (PARITY if kind == "cuda" else SCALES["cpu"]).values():
        for dtype in (LOW, torch.float32):
            check_parity(scale, options.device, dtype)
    print("parity with float64: good")
    rate = harness.copy_rate(options.device)
    print(
        f"\ncopying here {rate / 1e9:.0f} GB/s read and written; floor: the bytes that must move, at that rate\n\n"
        f"{'loss':<8}{'B x V x Q x K':<18}{'backend':<10}{'p20':>11}{'p50':>11}{'p80':>11}"
        f"{'/eager':>9}{'/stock':>8}{'floor':>11}{'share':>7}{'GiB':>8}"
    )
    rows = [row for name, scale in SCALES[kind].items() for row in measure(name, scale, options, rate)]
    path = harness.append_rows("losses" if kind == "cuda" else "losses_cpu", rows, options.device)
    print(f"\n{len(rows)} rows appended to {path.relative_to(harness.ROOT)}")


if __name__ == "__main__":
    main()
