"""The DALI loader on a CUDA device against the one on the CPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")

from personvit.config import CropsConfig, DataConfig, ModelConfig, PretrainConfig, TrainConfig
from personvit.data.loaders import build_pretrain_loader
from personvit.data.photometry import Photometry
from personvit.data.sources import FolderSource
from personvit.data.views import draw_views

CROPS = CropsConfig(global_size=(64, 32), local_size=(32, 16), local_crops=3)
PLAIN = {"jitter_probability": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": (0.0, 0.0, 0.0)}


def batches(loader: str, source, crops: CropsConfig = CROPS, decode: str = "auto", **kwargs):
    cfg = PretrainConfig(
        data=DataConfig(loader=loader, threads=2, decode=decode if loader == "dali-gpu" else "auto"),
        crops=crops,
        model=ModelConfig(patch_size=8),
        train=TrainConfig(batch_size=4),
    )
    return list(build_pretrain_loader(cfg, source, 0, 1, 0, **kwargs))


@pytest.fixture
def source(tmp_path) -> FolderSource:
    for number in range(22):
        small = np.random.default_rng(number).integers(0, 256, (8, 5, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((30 + number, 70 + 3 * number), Image.Resampling.BICUBIC)
        image.save(tmp_path / f"{number:02}.jpg", quality=90)
    return FolderSource(tmp_path)


def test_colour_path_equals_the_cpu_bit_for_bit():
    views = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 64, 32), dtype=np.uint8))
    drawn = draw_views(CROPS, np.full((64, 2), 100), seed=0)
    for view in range(3):
        found = []
        for device in (torch.device("cpu"), torch.device("cuda", 0)):
            out = torch.empty(views.shape, device=device)
            Photometry(CROPS, device)(views.to(device), drawn.views(slice(view, view + 1)), out)
            found.append(out.cpu())
        # Whole 8-bit values in both; the division that normalises them may round otherwise on a GPU.
        torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("decode", "tolerance"), [("cpu", 0.5), ("mixed", 2.0)])
def test_views_are_those_of_the_cpu(source, decode, tolerance):
    """nvJPEG's inverse transform and upsampling round otherwise than libjpeg-turbo's."""
    crops = dataclasses.replace(CROPS, **PLAIN, mean=(0.0,) * 3, std=(1.0,) * 3)
    for one, other in zip(batches("dali-cpu", source, crops), batches("dali-gpu", source, crops, decode), strict=True):
        assert other.global_crops.is_cuda
        assert other.local_crops.is_cuda
        assert torch.equal(one.positions, other.positions)
        assert torch.equal(one.masks, other.masks)
        for name in ("global_crops", "local_crops"):
            difference = (getattr(one, name) - getattr(other, name).cpu()).abs().mean() * 255
            assert difference < tolerance, name


def test_a_resumed_epoch_is_the_tail_of_the_whole_one(source):
    expected, found = batches("dali-gpu", source)[2:], batches("dali-gpu", source, start_step=2)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.global_crops, other.global_crops)
        assert torch.equal(one.local_crops, other.local_crops)


def test_bad_files_are_replaced_and_named_as_on_the_cpu(source, tmp_path):
    for number in (3, 8):
        content = (tmp_path / f"{number:02}.jpg").read_bytes()
        (tmp_path / f"{number:02}.jpg").write_bytes(content[: len(content) // 2])
    for one, other in zip(batches("dali-cpu", source), batches("dali-gpu", source), strict=True):
        assert one.bad == other.bad
        assert torch.equal(one.positions, other.positions)


def test_a_batch_stays_what_it_is_while_the_next_ones_are_made(source):
    """Its memory is not reused while the stream of the training still reads it."""
    kept = []
    for batch in batches("dali-gpu", source):
        torch.cuda._sleep(20_000_000)
        kept.append(batch.global_crops.clone())
    for one, other in zip(kept, batches("dali-gpu", source), strict=True):
        assert torch.equal(one, other.global_crops)
