"""Fine-tuning runs that last seconds: a 0.8M-parameter ViT on 32x16 images of persons of one noisy colour each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_runs import ROOT

from personvit.config import FinetuneConfig, load_config

TINY = [  # on top of the recipe finetune_demo, which may be tuned: what tests rely on is said here
    "input.size=[32,16]",
    "input.pad=2",
    "model.patch_size=8",
    "model.drop_path=0.2",
    "optim.name=sgd",
    "optim.lr=1e-2",
    "optim.bias_lr_factor=2.0",
    "optim.warmup_epochs=1",
    "train.epochs=3",
    "train.batch_size=8",
    "train.instances=2",
    "train.log_every=1",
    "train.precision=fp32",
    "eval.every_epochs=1",
    "eval.batch_size=16",
    "eval.rerank.k1=4",
    "eval.rerank.k2=2",
    "data.num_workers=0",
    "data.loader=torchvision",
]


def write_persons(root: Path, ids: int = 8, images: int = 2, first: int = 1) -> Path:
    """The layout of Market-1501: `ids` identities to train on and as many others to find, in two cameras each.

    Args:
        root: a new folder.
        ids: of each half.
        images: of each identity and camera.
        first: the lowest identity.
    """
    rng = np.random.default_rng(first)
    for folder, start in (("bounding_box_train", first), ("query", first + ids), ("bounding_box_test", first + ids)):
        (root / folder).mkdir(parents=True)
        for pid in range(start, start + ids):
            colour = np.random.default_rng(pid).integers(88, 168, 3)
            for camera in (1, 2):
                for number in range(1 if folder == "query" else images):
                    pixels = np.clip(colour + rng.integers(-60, 61, (12, 6, 3)) + 20 * camera, 0, 255)
                    image = Image.fromarray(pixels.astype(np.uint8)).resize((24, 48))
                    name = f"{pid:04}_c{camera}s1_{number + 10 * (folder == 'query'):06}_00.jpg"
                    image.save(root / folder / name)
    return root


def tiny_config(root: Path, *overrides: str) -> FinetuneConfig:
    return load_config(FinetuneConfig, "finetune_demo", [*TINY, f"data.root={root}", *overrides])


def arguments(root: Path, out: Path, *extra: str) -> list[str]:
    return [f"data.root={root}", "--out", str(out), *TINY, *extra]


def start(root: Path, out: Path, *extra: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The real command in a process of its own, one thread, so that runs are comparable bit for bit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *launcher, "personvit.finetune", *arguments(root, out, *extra)]
    return subprocess.Popen(
        command, cwd=out.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
