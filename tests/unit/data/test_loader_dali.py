"""The DALI loader on the CPU: the same contract as the torchvision loader, and nothing lost on bad files."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")

from personvit.config import CropsConfig, DataConfig, ModelConfig, PretrainConfig, TrainConfig
from personvit.data import loader_dali
from personvit.data.crops import MultiCrop
from personvit.data.loader_dali import plain_jpeg_size, thread_count
from personvit.data.loaders import CropBatch, build_pretrain_loader
from personvit.data.sources import FolderSource
from personvit.errors import DataError

SMALL = CropsConfig(global_size=(32, 16), local_size=(16, 8), local_crops=3)
PLAIN = {"jitter_probability": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": (0.0, 0.0, 0.0)}


def config(
    loader: str = "dali-cpu", batch_size: int = 4, accumulate: int = 1, threads: int = 2, crops: CropsConfig = SMALL
) -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(loader=loader, num_workers=0, threads=threads),
        crops=crops,
        model=ModelConfig(patch_size=8),
        train=TrainConfig(batch_size=batch_size, accumulate=accumulate),
    )


def batches(cfg: PretrainConfig, source, epoch: int = 0, rank: int = 0, world_size: int = 1, **kwargs):
    return list(build_pretrain_loader(cfg, source, rank, world_size, epoch, **kwargs))


def assert_same(one: CropBatch, other: CropBatch) -> None:
    for entry in dataclasses.fields(CropBatch):
        mine, theirs = getattr(one, entry.name), getattr(other, entry.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, entry.name


def levels(crops: torch.Tensor, cfg: CropsConfig) -> torch.Tensor:
    """Undo the normalisation: [N, 3, H, W] in [0, 255]."""
    return (crops * torch.tensor(cfg.std).view(3, 1, 1) + torch.tensor(cfg.mean).view(3, 1, 1)) * 255


def picture(seed: int, size: tuple[int, int] = (48, 100)) -> Image.Image:
    """Smooth colours of `size` (width, height)."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path) -> FolderSource:
    for number in range(22):
        picture(number, (30 + number, 70 + 3 * number)).save(tmp_path / f"{number:02}.jpg", quality=90)
    return FolderSource(tmp_path)


def test_positions_masks_and_shapes_are_those_of_torchvision(source):
    for one, other in zip(batches(config("torchvision"), source), batches(config(), source), strict=True):
        for name in ("masks", "mask_indices", "mask_weights", "positions"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        for name in ("global_crops", "local_crops"):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert one.bad == other.bad == []


def test_boxes_and_flips_are_those_of_torchvision(source):
    """Decoding, cutting, resizing and mirroring alone: only the rounding between the two passes differs."""
    crops = dataclasses.replace(SMALL, global_size=(64, 32), **PLAIN)
    for one, other in zip(
        batches(config("torchvision", crops=crops), source), batches(config(crops=crops), source), strict=True
    ):
        for name in ("global_crops", "local_crops"):
            difference = (levels(getattr(one, name), crops) - levels(getattr(other, name), crops)).abs()
            assert difference.mean() < 0.5
            assert difference.max() < 8


def test_the_whole_recipe_is_near_torchvision(source):
    crops = dataclasses.replace(SMALL, global_size=(64, 32))
    pairs = list(
        zip(batches(config("torchvision", crops=crops), source), batches(config(crops=crops), source), strict=True)
    )
    for name in ("global_crops", "local_crops"):
        one, other = (torch.cat([levels(getattr(pair[i], name), crops) for pair in pairs]) for i in range(2))
        assert (one - other).abs().mean() < 8  # hue: see the tests of the colour path
        assert (one.mean((0, 2, 3)) - other.mean((0, 2, 3))).abs().max() < 3


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("loader", ["dali-cpu", "torchvision"])
def test_a_resumed_epoch_is_the_tail_of_the_whole_one(source, loader, world_size, accumulate):
    cfg = config(loader, accumulate=accumulate)
    for rank in range(world_size):
        expected = batches(cfg, source, epoch=3, rank=rank, world_size=world_size)[2 * accumulate :]
        found = batches(cfg, source, epoch=3, rank=rank, world_size=world_size, start_step=2)
        assert len(found) == 3 * accumulate
        for one, other in zip(expected, found, strict=True):
            assert_same(one, other)


def test_threads_change_nothing(source):
    expected = batches(config(threads=1), source)
    for threads in (2, 3):
        for one, other in zip(expected, batches(config(threads=threads), source), strict=True):
            assert_same(one, other)


def test_ranks_and_accumulation_see_what_one_rank_sees(source):
    whole = batches(config(batch_size=8), source)
    cfg = config(batch_size=8, accumulate=2)
    parts = [batches(cfg, source, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        cut = [parts[rank][2 * step + micro] for micro in range(2) for rank in range(2)]
        for name, count in (("global_crops", 2), ("local_crops", 3), ("masks", 2)):
            joined = torch.cat([getattr(part, name).unflatten(0, (count, -1)) for part in cut], dim=1)
            assert torch.equal(getattr(batch, name).unflatten(0, (count, -1)), joined), name
        assert torch.equal(batch.positions, torch.cat([part.positions for part in cut]))


def test_epochs_differ_and_iterating_again_starts_over(source):
    loader = build_pretrain_loader(config(), source, 0, 1, 0)
    assert len(loader) == loader.steps == 5
    first = next(iter(loader))
    assert_same(first, next(iter(loader)))
    assert not torch.equal(first.global_crops, batches(config(), source, epoch=1)[0].global_crops)


def test_no_local_crops(source):
    assert batches(config(crops=dataclasses.replace(SMALL, local_crops=0)), source)[0].local_crops is None


def test_truncated_files_are_replaced_and_named_as_torchvision_does(source, tmp_path, truncate):
    for number in (3, 4, 8, 21):
        truncate(tmp_path / f"{number:02}.jpg")
    (tmp_path / "10.jpg").write_bytes(b"")
    (tmp_path / "11.jpg").write_text("<html>not found</html>")
    (tmp_path / "12.jpg").unlink()
    picture(0, (20_000, 12)).save(tmp_path / "13.jpg")  # refused
    expected, found = batches(config("torchvision"), source), batches(config(), source)
    assert sum(len(batch.bad) for batch in found) >= 8
    for one, other in zip(expected, found, strict=True):
        assert one.bad == other.bad
        assert torch.equal(one.positions, other.positions)


def spoil(content: bytes) -> bytes:
    """Whole to look at, but its first quantisation table has become a comment."""
    place = content.index(b"\xff\xdb")
    return content[:place] + b"\xff\xfe" + content[place + 2 :]


def test_a_file_that_fails_in_the_pipeline_costs_nothing_but_itself(source, tmp_path, caplog):
    """It gets past the look at its header: the pipeline fails, is rebuilt, and every other batch is what it was."""
    sound = batches(config(), source)
    paths = [tmp_path / f"{number:02}.jpg" for number in (5, 17)]
    for path in paths:
        content = spoil(path.read_bytes())
        assert plain_jpeg_size(content) is not None
        path.write_bytes(content)
    expected, found = batches(config("torchvision"), source), batches(config(), source)
    assert "Pillow decodes it" in caplog.text
    hit = 0
    for before, one, other in zip(sound, expected, found, strict=True):
        assert other.bad == one.bad
        assert torch.equal(other.positions, one.positions)
        if other.bad:
            hit += 1
            for row in torch.nonzero(before.positions == other.positions).flatten().tolist():
                assert torch.equal(before.global_crops[row], other.global_crops[row])  # Pillow decodes the same
        else:
            assert_same(before, other)
    assert 1 <= hit <= 2
    used = torch.cat([batch.positions for batch in found]).tolist()
    assert not {5, 17} & set(used)


def test_a_failure_of_dali_itself_is_an_error_with_a_way_out(source, monkeypatch):
    class Broken:
        def __init__(self, feed):
            self.feed = feed

        def run(self):
            self.feed()
            raise RuntimeError("Error: out of everything")

    from personvit.data import dali_graph

    monkeypatch.setattr(dali_graph, "build_pipeline", lambda feed, *args, **kwargs: Broken(feed))
    with pytest.raises(DataError, match=r"out of everything.*data\.loader=torchvision"):
        batches(config(), source)


@pytest.mark.parametrize("name", ["cmyk", "grey", "grey16", "palette", "rgba", "rotated", "progressive", "dot"])
def test_odd_images_look_as_they_do_through_pillow(tmp_path, name):
    image = picture(0, (60, 120))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    grey16 = Image.fromarray(np.random.default_rng(0).integers(0, 60_000, (120, 60), dtype=np.uint16))
    content = {
        "cmyk": lambda: encoded(image.convert("CMYK")),
        "grey": lambda: encoded(image.convert("L")),
        "grey16": lambda: encoded(grey16, "PNG"),
        "palette": lambda: encoded(image.convert("P"), "PNG"),
        "rgba": lambda: encoded(image.convert("RGBA"), "PNG"),
        "rotated": lambda: encoded(image, exif=exif.tobytes()),
        "progressive": lambda: encoded(image, progressive=True),
        "dot": lambda: encoded(picture(0, (1, 1))),
    }[name]()
    (tmp_path / "a.jpg").write_bytes(content)
    crops = dataclasses.replace(SMALL, **PLAIN)
    source = FolderSource(tmp_path)
    one, other = (batches(config(loader, 1, crops=crops), source)[0] for loader in ("torchvision", "dali-cpu"))
    assert other.bad == []
    difference = (levels(one.global_crops, crops) - levels(other.global_crops, crops)).abs()
    assert difference.mean() < 1.0
    assert difference.max() < 12


def test_only_plain_whole_jpegs_go_to_dali_as_they_are(tmp_path):
    image = picture(0, (60, 120))
    for options in ({}, {"progressive": True}, {"optimize": True}, {"subsampling": 0}, {"restart_marker_rows": 1}):
        assert plain_jpeg_size(encoded(image, **options)) == (120, 60)
    assert plain_jpeg_size(encoded(image.convert("L"))) == (120, 60)
    whole = encoded(image)
    for content in (
        b"", b"\xff\xd8\xff\xd9", whole[:-1], whole[:300], whole[:100] + b"\xff\xd9", whole + b"\0",
        encoded(image, "PNG"), encoded(image.convert("CMYK")), encoded(image, keep_rgb=True),
        encoded(picture(0, (20_000, 12))),
    ):  # fmt: skip
        assert plain_jpeg_size(content) is None


def test_rubbish_alone_stops_with_a_command(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"32 files in a row.*personvit data check"):
        batches(config(), FolderSource(tmp_path))


def test_threads_end_with_the_iterator_and_torchs_threads_stay(source):
    before, cores = threading.active_count(), torch.get_num_threads()
    iterator = iter(build_pretrain_loader(config(), source, 0, 1, 0))
    next(iterator)
    found: list[int] = []
    late = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert found == [cores]
    iterator.close()
    assert threading.active_count() == before
    assert torch.get_num_threads() == cores


def test_a_program_that_ends_in_mid_epoch_does_not_hang(source):
    program = f"""
from personvit.config import PretrainConfig, load_config
from personvit.data.loaders import build_pretrain_loader
from personvit.data.sources import FolderSource
small = ["crops.global_size=[32,16]", "crops.local_size=[16,16]", "train.batch_size=4", "data.loader=dali-cpu"]
cfg = load_config(PretrainConfig, overrides=small)
batches = iter(build_pretrain_loader(cfg, FolderSource({source.root!r}), 0, 1, 0))
next(batches)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_a_reading_error_reaches_the_caller(source, monkeypatch):
    monkeypatch.setattr(loader_dali, "draw_views", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batches(config(), source)


def test_thread_count():
    assert thread_count(3) == 3
    assert 1 <= thread_count(-1) <= 16


def test_multi_crop_and_the_loader_agree_on_a_position(source):
    """Position p of an epoch is image number p of the crops' stream, whoever cuts it."""
    crops = dataclasses.replace(SMALL, **PLAIN)
    batch = batches(config("torchvision", crops=crops), source)[1]
    from personvit.data.batches import BatchPlan

    plan = BatchPlan(config(crops=crops), source, 0, 1, 0)
    image = source.load(int(batch.positions[2]))
    views, _ = MultiCrop(crops)(image, plan.crops_seed, plan.first_position(1) + 2)
    assert torch.equal(batch.global_crops[2], views[0])
