"""Images per second of the loaders, on the same files, with the full multi-crop recipe.

python benchmarks/bench_data.py                      generated persons
python benchmarks/bench_data.py --root FOLDER        any source that data.root takes
python benchmarks/bench_data.py --recipe demo --train  also: which share of real steps of a recipe waits for data
python benchmarks/bench_data.py --step-ms 200        the same of steps that only sleep, as the host of a GPU does
python benchmarks/bench_data.py --quick              a smoke test; its figures say nothing

On a CPU: torchvision with 1 and 2 reader processes, dali-cpu with 1 and 2 threads. With a GPU also dali-gpu, JPEGs
decoded on the CPU, or by nvJPEG with a share of 0, 0.35, 0.65 and 0.9 for the hardware decoder; processes and threads
are then --workers. Before anything is timed, the boxes, mirrors and sizes of dali-cpu must be those of torchvision.

The variants take turns, a few batches each, so that a noisy moment of the machine hits all. Images and crops per second
are those of a loader that has the machine to itself. The waiting is measured after that, in the same turn: time in
which a step has no batch yet, of all the time. With --train the steps are those of a run (forward, backward, AdamW,
moving average, on the GPU if there is one), and on a CPU they share its cores with the loader, as in a run. Rows are
appended to benchmarks/results/data.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import harness
import torch
from PIL import Image

from personvit.config import DataConfig, PretrainConfig, load_config
from personvit.data.loaders import CropBatch, build_pretrain_loader
from personvit.data.sources import ImageSource, open_source
from personvit.engine.step import PretrainStep
from personvit.runtime.distributed import Ranks
from personvit.runtime.memory import keep_freed_memory

GOAL = 2.0  # dali-cpu over torchvision, as many threads as processes
PARITY_LEVELS = 0.5  # mean difference of cut, resized and mirrored views, of 255
WARMUP_BATCHES = 6  # longer than what the readers keep ready


class Variant(NamedTuple):
    """A loader and its settings."""

    loader: str
    workers: int
    """Processes of torchvision, threads of DALI."""
    decode: str = "cpu"
    hw_decoder_load: float = 0.0

    def data(self, cfg: DataConfig) -> DataConfig:
        """The configuration of this variant."""
        return dataclasses.replace(
            cfg,
            loader=self.loader,
            num_workers=self.workers,
            threads=max(1, self.workers),
            decode=self.decode if self.loader == "dali-gpu" else "auto",
            hw_decoder_load=self.hw_decoder_load,
        )

    def text(self) -> str:
        """For a table."""
        load = f", load {self.hw_decoder_load:g}" if self.decode == "mixed" else ""
        decode = f" decode {self.decode}{load}" if self.loader == "dali-gpu" else ""
        return f"{self.loader} x {self.workers}{decode}"


def variants(workers: list[int], quick: bool) -> list[Variant]:
    """What can run on this machine."""
    found = [Variant("torchvision", count) for count in workers]
    if importlib.util.find_spec("nvidia.dali") is None:
        print("DALI is not installed: torchvision alone (pip install nvidia-dali-cuda130)")
        return found
    found += [Variant("dali-cpu", count) for count in workers]
    if torch.cuda.is_available():
        found += [Variant("dali-gpu", count) for count in workers]
        loads = (0.65,) if quick else (0.0, 0.35, 0.65, 0.9)
        found += [Variant("dali-gpu", workers[-1], "mixed", load) for load in loads]
    return found


class Repeated:
    """A source over and over, so that a turn fits into one epoch: the start of an epoch is not what is timed."""

    def __init__(self, source: ImageSource, images: int) -> None:
        self._source, self._images = source, max(images, len(source))

    def __len__(self) -> int:
        return self._images

    def path(self, index: int) -> str:
        """Of the image that stands for this one."""
        return self._source.path(index % len(self._source))

    def read(self, index: int) -> bytes:
        """Of the image that stands for this one."""
        return self._source.read(index % len(self._source))

    def load(self, index: int) -> Image.Image:
        """Of the image that stands for this one."""
        return self._source.load(index % len(self._source))


def sleeping_step(seconds: float) -> Callable[[CropBatch], None]:
    """A step that leaves the host alone."""
    return lambda batch: time.sleep(seconds)


def training_step(cfg: PretrainConfig) -> Callable[[CropBatch], None]:
    """Whole steps of a run of this configuration, one after the other."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    trainer = PretrainStep(cfg, Ranks(0, 1, 0, device), steps_per_epoch=1)

    def step(batch: CropBatch) -> None:
        trainer.forward_backward(batch.to(device), 0, 0)
        trainer.finish(0)

    return step


def seconds_per_batch(
    cfg: PretrainConfig, source: ImageSource, count: int, step: Callable[[CropBatch], None] | None
) -> tuple[float, float | None, float | None]:
    """Seconds per batch of the loader alone; seconds of a step with its waiting, and the share that is waiting."""
    loader = iter(build_pretrain_loader(cfg, source, 0, 1, 0))
    for _ in range(WARMUP_BATCHES):
        next(loader)
    begin = time.perf_counter()
    for _ in range(count):
        next(loader)
    _synchronise()
    seconds = (time.perf_counter() - begin) / count
    waited, whole = 0.0, None
    if step is not None:
        step(next(loader))  # what is made at the first step is not what is timed
        begin = time.perf_counter()
        for _ in range(count):
            start = time.perf_counter()
            batch = next(loader)
            waited += time.perf_counter() - start
            step(batch)
        whole = time.perf_counter() - begin
    loader.close()  # type: ignore[attr-defined]
    return (seconds, None, None) if whole is None else (seconds, whole / count, waited / whole)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_parity(cfg: PretrainConfig, source: ImageSource) -> None:
    """Stop if dali-cpu cuts, resizes and mirrors otherwise than torchvision."""
    off = {"jitter_probability": 0.0, "grayscale": 0.0, "blur": (0.0,) * 3, "solarize": (0.0,) * 3}
    plain = dataclasses.replace(cfg.crops, **off, mean=(0.0,) * 3, std=(1.0,) * 3)
    found = []
    for loader in ("torchvision", "dali-cpu"):
        variant = dataclasses.replace(cfg, crops=plain, data=Variant(loader, 0).data(cfg.data))
        found.append(next(iter(build_pretrain_loader(variant, source, 0, 1, 0))))
    one, other = found
    assert one.local_crops is not None
    assert other.local_crops is not None
    level = max(
        float((a.cpu() - b.cpu()).abs().mean()) * 255
        for a, b in ((one.global_crops, other.global_crops), (one.local_crops, other.local_crops))
    )
    print(f"parity: views of dali-cpu are {level:.2f} of 255 levels from those of torchvision on average")
    if not level < PARITY_LEVELS or not torch.equal(one.masks, other.masks):
        raise SystemExit(f"parity failed: at most {PARITY_LEVELS} levels are expected. Nothing was timed.")


def main() -> None:
    """Measure, print, append."""
    options = _options()
    keep_freed_memory()  # as a run on a CPU does
    device = "cuda" if torch.cuda.is_available() else "cpu"
    harness.announce(device)
    cfg = load_config(
        PretrainConfig,
        recipe=options.recipe,
        overrides=[
            f"train.batch_size={options.batch_size}",
            f"data.generated_train={min(8000, options.batch_size * 12)}",
            *([f"data.root={options.root}"] if options.root else []),
            *options.overrides,
        ],
    )
    source = Repeated(open_source(cfg.data), options.batch_size * (WARMUP_BATCHES + 2 * options.batches + 1))
    views = 2 + cfg.crops.local_crops
    print(f"{len(source)} images, batches of {options.batch_size}, {views} views of each, recipe {options.recipe}")
    found = variants(options.workers, options.quick)
    if len(found) > len(options.workers):
        check_parity(cfg, source)
    times: dict[Variant, list[float]] = {variant: [] for variant in found}
    waits: dict[Variant, list[tuple[float, float]]] = {variant: [] for variant in found}
    step = training_step(cfg) if options.train else sleeping_step(options.step_ms / 1e3) if options.step_ms else None
    for _ in range(options.rounds):
        for variant in found:
            run = dataclasses.replace(cfg, data=variant.data(cfg.data))
            seconds, whole, wait = seconds_per_batch(run, source, options.batches, step)
            times[variant].append(seconds)
            if whole is not None and wait is not None:
                waits[variant].append((whole, wait))
    rows = []
    print(f"{'loader':40} {'images/s':>9} {'crops/s':>9} {'ms a step':>9} {'waits':>6}")
    for variant in found:
        measured = harness.Measurement(tuple(times[variant]), None)
        step_ms, wait = _medians(waits[variant])
        images = options.batch_size / measured.at(50)
        stepping = "" if step_ms is None or wait is None else f"{step_ms:9.0f} {wait:6.1%}"
        print(f"{variant.text():40} {images:9.1f} {views * images:9.0f} {stepping}")
        more = {
            "workers": variant.workers, "decode": variant.decode, "hw_decoder_load": variant.hw_decoder_load,
            "images_per_s": images, "crops_per_s": views * images, "recipe": options.recipe,
            "source": Path(options.root).name if options.root else "generated",
            "step": None if step is None else "train" if options.train else "sleep",
            "step_ms": step_ms, "data_wait": wait,
        }  # fmt: skip
        rows.append(harness.row("data", variant.loader, [options.batch_size, views], measured, **more))
    _print_ratios(times)
    if not options.quick:
        print(f"rows appended to {harness.append_rows('data', rows, device)}")


def _medians(steps: list[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Milliseconds of a step, waiting included, and share of the waiting."""
    if not steps:
        return None, None
    return 1e3 * statistics.median(whole for whole, _ in steps), statistics.median(wait for _, wait in steps)


def _print_ratios(times: dict[Variant, list[float]]) -> None:
    """dali-cpu against torchvision, round by round, so that both saw the same moments of the machine."""
    for variant, seconds in times.items():
        baseline = times.get(Variant("torchvision", variant.workers))
        if variant.loader == "dali-cpu" and baseline:
            ratio = statistics.median(slow / fast for slow, fast in zip(baseline, seconds, strict=True))
            print(f"dali-cpu / torchvision, {variant.workers} threads / processes: {ratio:.2f} (goal {GOAL:g})")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [1, 2] if not torch.cuda.is_available() else [4, 16]
    parser.add_argument("--root", help="images; default: generated persons")
    parser.add_argument("--recipe", default="vit_small_luperson", help="crops of this recipe (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128 if torch.cuda.is_available() else 64)
    parser.add_argument("--batches", type=int, default=32 if torch.cuda.is_available() else 8, help="timed, a turn")
    parser.add_argument("--rounds", type=int, default=3 if torch.cuda.is_available() else 5)
    parser.add_argument("--workers", type=int, nargs="+", default=default, help="processes or threads (%(default)s)")
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--train", action="store_true", help="also measure the waiting of real steps of the recipe")
    step.add_argument("--step-ms", type=float, default=0, help="also measure the waiting of steps that sleep so long")
    parser.add_argument("--quick", action="store_true", help="a few small batches, nothing is appended")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration")
    options = parser.parse_args()
    if options.quick:
        options.batch_size, options.batches, options.rounds = min(options.batch_size, 8), 2, 1
    return options


if __name__ == "__main__":
    main()
