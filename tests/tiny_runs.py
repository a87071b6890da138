"""Pre-training runs that last seconds: a 0.2M-parameter ViT on 32x16 crops of noise images."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from personvit.config import PretrainConfig, load_config
from personvit.runtime.runlog import read_metrics

ROOT = Path(__file__).resolve().parent.parent

TINY = [  # on top of the recipe demo, which may be tuned: what tests rely on is said here
    "loss.centering=centre",
    "loss.teacher_temp=[0.04,0.07]",
    "loss.teacher_patch_temp=[0.04,0.07]",
    "optim.lr=5e-4",
    "optim.momentum=[0.99,1.0]",
    "optim.freeze_last_layer_epochs=1",
    "head.norm_last_layer=false",
    "model.patch_size=8",
    "model.drop_path=0.0",
    "crops.global_size=[32,16]",
    "crops.local_size=[16,8]",
    "crops.local_crops=2",
    "head.prototypes=32",
    "head.patch_prototypes=32",
    "head.hidden_dim=32",
    "head.bottleneck_dim=16",
    "loss.teacher_temp_warmup_epochs=1",
    "optim.warmup_epochs=1",
    "train.batch_size=4",
    "train.epochs=2",
    "train.log_every=1",
    "health.every=2",
    "data.num_workers=0",
]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Such small tensors are slower on several threads, and many times slower where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_crops(folder: Path, count: int = 16) -> Path:
    """JPEG files of varying size; smooth noise, so that JPEG keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = generator.integers(0, 256, (6, 3, 3), dtype=np.uint8)
        size = (int(generator.integers(16, 30)), int(generator.integers(40, 64)))
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:04}.jpg", quality=90)
    return folder


def tiny_config(root: Path, *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, "demo", [*TINY, f"data.root={root}", *overrides])


def arguments(root: Path, out: Path, *extra: str) -> list[str]:
    return [f"data.root={root}", "--out", str(out), *TINY, *extra]


def start(root: Path, out: Path, *extra: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The real command in a process of its own, one thread, so that runs are comparable bit for bit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *launcher, "personvit.pretrain", *arguments(root, out, *extra)]
    return subprocess.Popen(
        command, cwd=out.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Output of a process that must succeed."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def wait_for_step(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if metrics.exists() and any(row["step"] >= step for row in read_metrics(metrics)):
            return
        if process.poll() is not None:
            raise AssertionError(f"ended before step {step}: {process.communicate()[0]}")
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached in 60 s")


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Bit for bit, through nested containers."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, f"{where}: {left} != {right}"


def train_rows(metrics: Path) -> list[dict[str, Any]]:
    """Rows of the training without what the clock put in."""
    clock = {"images_per_s", "data_wait", "memory_gb"}
    return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(metrics)]
