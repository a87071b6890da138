"""The whole pre-training step, from crops on the device to updated student, teacher and centres, in several variants.

python benchmarks/bench_pretrain.py            GPU: ViT-S and ViT-B, real shapes, bf16; CPU: the recipe `demo`, fp32
python benchmarks/bench_pretrain.py --quick    a smoke test; its figures say nothing
python benchmarks/bench_pretrain.py --variants eager-ibot fused

All variants start from the same weights and see the same batch (noise for pixels, masks drawn as in a run); drop path
is 0 in all of them, so that their losses can be, and are, compared before anything is timed. Each variant is a process
of its own, since kernels.backend is one choice for a process; they take turns, a few steps each, so that a noisy moment
of the machine hits all. Rows are appended to benchmarks/results/pretrain.jsonl, or pretrain_cpu.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import math
import multiprocessing
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import eager_ibot
import harness
import torch

from personvit.config import PretrainConfig, load_config
from personvit.data.batches import CropBatch, pads_masks
from personvit.data.masks import BlockMaskGenerator, mask_bound, masked_patches
from personvit.engine.step import PretrainStep
from personvit.models.vit import ARCHITECTURES
from personvit.ops import backend
from personvit.runtime.distributed import Ranks
from personvit.runtime.memory import keep_freed_memory

BASELINE = "eager-ibot"
GOAL = 1.3  # fused over the baseline, on a CPU
PEAK_FLOPS = 989e12  # dense bf16 of an H100 SXM or H200, as published
STEPS_PER_EPOCH = 1000
FIRST_STEP = STEPS_PER_EPOCH  # an epoch in: the prototypes train, the learning rate is not 0
COMPARED_STEPS = 3
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 2e-2)}  # of losses: at the same weights, and after some updates
SAME_RECIPE = ["model.drop_path=0.0", "loss.centering=centre", "loss.patch_centering=centre"]


class Variant(NamedTuple):
    """How a step is computed."""

    about: str
    eager: bool | None = None
    """A step of eager_ibot, with its heads on all tokens (True) or on masked ones (False); None: the project's."""
    stock: bool = True
    """Without the project's Triton kernels."""
    compiled: bool = False


VARIANTS = {
    BASELINE: Variant("plain eager step of iBOT, heads on all tokens", eager=True),
    "masked-heads": Variant("the same, heads on masked tokens only", eager=False),
    "packed": Variant("one token stream, torch SDPA, one-pass losses, no kernels of ours"),
    "compiled": Variant("packed, blocks under torch.compile", compiled=True),
    "fused": Variant("kernels.backend=fused", stock=False),
    "fused+compiled": Variant("kernels.backend=fused, blocks under torch.compile", stock=False, compiled=True),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe, and how much of it at a time."""

    recipe: str
    images: int
    device: str
    overrides: tuple[str, ...] = ()

    def config(self, compiled: bool = False) -> PretrainConfig:
        size = [f"train.batch_size={self.images}", f"train.compile={str(compiled).lower()}"]
        return load_config(PretrainConfig, self.recipe, [*SAME_RECIPE, *self.overrides, *size])

    def batch(self, seed: int) -> CropBatch:
        cfg = self.config()
        generator = torch.Generator().manual_seed(seed)
        grid = tuple(side // cfg.model.patch_size for side in cfg.crops.global_size)
        masks = BlockMaskGenerator(cfg.masks, grid)(2 * self.images, seed).flatten(1)
        bound = mask_bound(cfg.masks, math.prod(grid), 2 * self.images) if pads_masks() else None
        local = cfg.crops.local_crops * self.images
        crops = torch.randn(2 * self.images, 3, *cfg.crops.global_size, generator=generator)
        local_crops = torch.randn(local, 3, *cfg.crops.local_size, generator=generator) if local else None
        indices, weights = masked_patches(masks, bound)
        return CropBatch(crops, local_crops, masks, indices, weights, torch.arange(self.images), []).to(self.device)


def flops_per_image(cfg: PretrainConfig, masked: float) -> float:
    """Floating-point operations of a step that any variant needs, per image.

    2 a multiply-add; a block takes 24 D^2 + 4 n D a token; the backward is twice the forward; heads on CLS and masked
    tokens, except that the teacher's trunk also serves the centre of all patches; in the student's last block the
    other tokens stop after the attention (18 D^2 less each). No elementwise work.

    Args:
        cfg: sizes.
        masked: masked patches of an image, both global crops together.
    """
    dim, depth, _ = ARCHITECTURES[cfg.model.arch]
    head = cfg.head
    trunk = 2.0 * (dim * head.hidden_dim + head.hidden_dim**2 + head.hidden_dim * head.bottleneck_dim)
    project_cls = 2.0 * head.bottleneck_dim * head.prototypes
    project_patch = 2.0 * head.bottleneck_dim * head.patch_prototypes

    def patches_of(size: tuple[int, int]) -> int:
        return size[0] * size[1] // cfg.model.patch_size**2

    def forward(size: tuple[int, int]) -> float:
        patches = patches_of(size)
        tokens = patches + 1
        embed = patches * 2.0 * 3 * cfg.model.patch_size**2 * dim
        return embed + tokens * depth * (24.0 * dim**2 + 4.0 * tokens * dim)

    crops = cfg.crops
    views = 2 + crops.local_crops
    student = 2 * forward(crops.global_size) + crops.local_crops * forward(crops.local_size)
    tokens = 2 * (1 + patches_of(crops.global_size)) + crops.local_crops * (1 + patches_of(crops.local_size))
    student -= (tokens - views - masked) * 18.0 * dim**2
    student += views * (trunk + project_cls) + masked * (trunk + project_patch)
    teacher = 2 * forward(crops.global_size) + 2 * (1 + patches_of(crops.global_size)) * trunk
    teacher += 2 * project_cls + masked * project_patch
    return 3 * student + teacher


class Worker:
    """A variant in a process of its own."""

    def __init__(self, name: str, case: Case, seed: int) -> None:
        variant = VARIANTS[name]
        if variant.stock:
            _without_triton()
        backend.set_backend("auto" if variant.stock else "fused")
        self._device = case.device
        self._batch = case.batch(seed)
        cfg, device = case.config(variant.compiled), torch.device(case.device)
        self._step: Any
        if variant.eager is None:
            self._step = PretrainStep(cfg, Ranks(0, 1, 0, device), STEPS_PER_EPOCH)
        else:
            self._step = eager_ibot.EagerStep(cfg, device, STEPS_PER_EPOCH, masked_heads=not variant.eager)

    def _one(self, index: int = FIRST_STEP) -> Any:
        self._step.forward_backward(self._batch, index, 0)
        return self._step.finish(index)

    def losses(self) -> list[tuple[float, ...]]:
        """(loss, CLS, patch, gradient norm) of the first steps from the initial weights."""
        return [dataclasses.astuple(self._one(FIRST_STEP + n))[:4] for n in range(COMPARED_STEPS)]

    def steps(self, count: int) -> None:
        """Some steps in a row."""
        for _ in range(count):
            self._one()

    def time(self, steps: int) -> dict[str, Any]:
        """Seconds of some steps in a row, after one that does not count.

        A step ends where the host has read its numbers, which waits for the device: its update then overlaps with the
        launches of the next step, as in a run.
        """
        self._one()
        marks = []
        with harness.PowerMeter(self._device) as meter:
            marks.append(time.perf_counter())
            for _ in range(steps):
                self._one()
                marks.append(time.perf_counter())
        seconds = [end - begin for begin, end in itertools.pairwise(marks)]
        return {"seconds": seconds, "joules": meter.joules, "watts": meter.watts, "sm_clock_mhz": meter.sm_clock_mhz}

    def peak(self) -> int | None:
        """Bytes of a step above what is there between steps (weights, optimiser, batch)."""
        return harness.measure(self._one, repeats=1, warmup=1, device=self._device).peak_bytes

    def release(self) -> None:
        """Give cached memory back, for the variants that take their turn next."""
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()


def _without_triton() -> None:
    for name, operator in list(backend._operators.items()):
        stock = tuple(implementation for implementation in operator.faster if implementation.backend != "triton")
        backend._operators[name] = dataclasses.replace(operator, faster=stock)


def _serve(connection: Connection, threads: int, *arguments: Any) -> None:
    """Answer (method, arguments) with (result, error)."""
    logging.getLogger("personvit").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    keep_freed_memory()  # for every variant: as a run on a CPU does
    try:
        worker = Worker(*arguments)
        connection.send((None, None))
        while (request := connection.recv()) is not None:
            method, values = request
            connection.send((getattr(worker, method)(*values), None))
    except Exception as error:
        traceback.print_exc()
        connection.send((None, f"{type(error).__name__}: {error}"))


class Remote:
    """A worker seen from the process that directs them."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def ask(self, method: str, *values: Any) -> Any:
        """The method's result.

        Raises:
            RuntimeError: what went wrong over there.
        """
        self._connection.send((method, values))
        return self._receive()

    def _receive(self) -> Any:
        try:
            result, error = self._connection.recv()
        except EOFError:
            error = "the process died (out of memory?)"
        if error is not None:
            raise RuntimeError(error)
        return result

    def close(self) -> None:
        try:
            self._connection.send(None)
        except OSError:  # it has left already
            return
        self._process.join(timeout=30)


def check_parity(losses: dict[str, list[tuple[float, ...]]], precision: str) -> None:
    """Stop unless all variants give the same (loss, CLS, patch, gradient norm) at each step."""
    first, later = TOLERANCE[precision]
    reference = next(iter(losses.values()))
    for name, steps in losses.items():
        for index, (ours, wanted) in enumerate(zip(steps, reference, strict=True)):
            allowed = later if index else first
            close = [math.isclose(a, b, rel_tol=allowed) for a, b in zip(ours[:3], wanted[:3], strict=True)]
            # The norm of the gradients shows errors of the backward; rounding adds up over its depth.
            if not all(close) or not math.isclose(ours[3], wanted[3], rel_tol=max(10 * allowed, 1e-3)):
                raise SystemExit(f"parity: step {index} of {name} gives {ours}, {next(iter(losses))} gives {wanted}")
    shown = ", ".join(f"{value:.6f}" for value in reference[0][:3])
    print(f"parity: {len(losses)} variants agree over {COMPARED_STEPS} steps (loss, CLS, patch of the first: {shown})")


def start(case: Case, options: argparse.Namespace) -> tuple[dict[str, Remote], dict[str, list[tuple[float, ...]]]]:
    """The variants that run here, and their first losses."""
    workers, losses = {}, {}
    for name in options.variants:
        try:
            worker = Remote(torch.get_num_threads(), name, case, options.seed)
            losses[name] = worker.ask("losses")
            worker.ask("release")
        except RuntimeError as error:
            print(f"left out: {name}: {error}")
            continue
        workers[name] = worker
    return workers, losses


def run_case(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Parity, turns of all variants, table. Returns rows of results."""
    cfg = case.config()
    print(f"\n{case.recipe}: {case.images} images of 2 global and {cfg.crops.local_crops} local crops", end=" ")
    print(f"({cfg.crops.global_size}, {cfg.crops.local_size}), {cfg.train.precision}, drop path 0", flush=True)
    workers, losses = start(case, options)
    if not workers:
        raise SystemExit("no variant runs here")
    try:
        check_parity(losses, cfg.train.precision)
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for _ in range(options.rounds):
            for name, worker in workers.items():
                turns[name].append(worker.ask("time", options.steps))
                worker.ask("release")
        peaks = {}
        for name, worker in workers.items():
            peaks[name] = worker.ask("peak")
            worker.ask("release")
    finally:
        for worker in workers.values():
            worker.close()
    masked = case.batch(options.seed).masked / case.images
    return report(case, cfg, turns, peaks, losses, flops_per_image(cfg, masked))


def report(
    case: Case,
    cfg: PretrainConfig,
    turns: dict[str, list[dict[str, Any]]],
    peaks: dict[str, int | None],
    losses: dict[str, list[tuple[float, ...]]],
    flops: float,
) -> list[dict[str, Any]]:
    """Print the table of a case. Returns its rows of results."""
    gpu = case.device.startswith("cuda")
    print(f"{flops / 1e9:.2f} GFLOP an image; peak: memory of a step above weights, optimiser and batch")
    print(
        f"{'variant':<16}{'images/s':>9}{'p20':>9}{'p50':>9}{'p80 ms':>9}{'x base':>8}{'peak GiB':>10}"
        + (f"{'MFU':>7}{'J/image':>9}{'W':>6}{'SM MHz':>8}" if gpu else "")
    )
    shape = [case.images, *cfg.crops.global_size, cfg.crops.local_crops, *cfg.crops.local_size]
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[cfg.train.precision]
    base = _measured(turns[BASELINE], None).at(50) if BASELINE in turns else None
    rows = []
    for name, parts in turns.items():
        measured = _measured(parts, peaks[name])
        rate = case.images / measured.at(50)
        more: dict[str, Any] = {
            "recipe": case.recipe,
            "images_per_s": rate,
            "ratio": None if base is None else base / measured.at(50),
            "flops_per_image": flops,
            "loss": losses[name][0][0],
        }
        ratio = "" if more["ratio"] is None else f"{more['ratio']:.2f}x"
        peak = "?" if measured.peak_bytes is None else f"{measured.peak_bytes / 2**30:.2f}"
        line = f"{name:<16}{rate:>9.1f}" + "".join(f"{1e3 * measured.at(p):>9.1f}" for p in (20, 50, 80))
        line += f"{ratio:>8}{peak:>10}"
        if gpu:
            more |= _power(parts, case.images * len(measured.seconds)) | {"mfu": rate * flops / PEAK_FLOPS}
            joules, watts, clock = (more[key] or 0 for key in ("joules_per_image", "watts", "sm_clock_mhz"))
            line += f"{100 * more['mfu']:>6.1f}%{joules:>9.3f}{watts:>6.0f}{clock:>8.0f}"
        print(line, flush=True)
        rows.append(harness.row("pretrain_step", name, shape, measured, dtype=dtype, **more))
    return rows


def _measured(parts: list[dict[str, Any]], peak: int | None) -> harness.Measurement:
    return harness.Measurement(tuple(value for part in parts for value in part["seconds"]), peak)


def _power(parts: list[dict[str, Any]], images: int) -> dict[str, float | None]:
    """Energy of an image, mean power and clock over the timed turns; None where the card does not tell."""

    def known(key: str) -> list[float] | None:
        values = [part[key] for part in parts]
        return None if any(value is None for value in values) else values

    joules, watts, clocks = known("joules"), known("watts"), known("sm_clock_mhz")
    return {
        "joules_per_image": None if joules is None else sum(joules) / images,
        "watts": None if watts is None else sum(watts) / len(watts),
        "sm_clock_mhz": None if clocks is None else sum(clocks) / len(clocks),
    }


def cases(options: argparse.Namespace) -> list[Case]:
    """What to measure here."""
    if not options.device.startswith("cuda"):
        tiny = ("crops.global_size=[32,16]", "crops.local_size=[16,8]", "head.hidden_dim=64")
        return [Case("demo", 8 if options.quick else 64, options.device, tiny if options.quick else ())]
    if options.quick:
        return [Case("vit_small_luperson", 8, options.device)]
    recipes = [f"vit_{model}_luperson" for model in options.models]
    return [Case(recipe, images, options.device) for recipe in recipes for images in options.images]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps of few images")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--models", nargs="+", default=["small", "base"], choices=["small", "base"], help="GPU only")
    parser.add_argument("--images", nargs="+", type=int, default=[64, 128], help="GPU only; default 64 128")
    parser.add_argument("--rounds", type=int, help="turns of each variant; default 6")
    parser.add_argument("--steps", type=int, help="timed steps of a turn; default 20, on a CPU 4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    gpu = options.device.startswith("cuda")
    options.rounds = options.rounds or (1 if options.quick else 6)
    options.steps = options.steps or (2 if options.quick else 20 if gpu else 4)
    if options.threads:
        torch.set_num_threads(options.threads)
    harness.announce(options.device)
    if gpu:
        print(f"MFU: share of {PEAK_FLOPS / 1e12:.0f} TFLOP/s, the dense bf16 peak of a Hopper SXM card")
    if options.quick:
        print("--quick: a smoke test where fixed costs rule. No figure below speaks for a real run.")
    for name in options.variants:
        print(f"  {name:<16}{VARIANTS[name].about}")
    rows = [row for case in cases(options) for row in run_case(case, options)]
    if not gpu:
        ratios = {row["backend"]: row["ratio"] for row in rows}
        if ratios.get("fused") is not None:
            met = "met" if ratios["fused"] >= GOAL else "MISSED"
            print(f"\nfused / {BASELINE} on this CPU: {ratios['fused']:.2f}x; goal {GOAL}x: {met}")
    name = "pretrain" + ("" if gpu else "_cpu") + ("_quick" if options.quick else "")
    path = harness.append_rows(name, rows, options.device)
    print(f"{len(rows)} rows appended to {path.relative_to(harness.ROOT)}")


if __name__ == "__main__":
    main()
