from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from personvit.config import CropsConfig, DataConfig, MasksConfig, ModelConfig, PretrainConfig, TrainConfig
from personvit.data.loaders import CropBatch, build_pretrain_loader, reader_count, steps_per_epoch
from personvit.data.sources import FolderSource, ListSource
from personvit.errors import ConfigError, DataError

GRID = (4, 2)


def config(
    batch_size: int = 4, workers: int = 0, accumulate: int = 1, seed: int = 0, loader: str = "torchvision", **sections
) -> PretrainConfig:
    sections.setdefault("crops", CropsConfig(global_size=(32, 16), local_size=(16, 8), local_crops=3))
    return PretrainConfig(
        data=DataConfig(loader=loader, num_workers=workers),
        model=ModelConfig(patch_size=8),
        train=TrainConfig(batch_size=batch_size, accumulate=accumulate, seed=seed),
        **sections,
    )


def batches(cfg: PretrainConfig, source, epoch: int = 0, rank: int = 0, world_size: int = 1, **kwargs):
    return list(build_pretrain_loader(cfg, source, rank, world_size, epoch, **kwargs))


def assert_same(one: CropBatch, other: CropBatch) -> None:
    for entry in dataclasses.fields(CropBatch):
        mine, theirs = getattr(one, entry.name), getattr(other, entry.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, entry.name


def views(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Crop-major rows [count * B, ...] -> [count, B, ...]."""
    return tensor.unflatten(0, (count, -1))


def assert_parts_make(whole: CropBatch, parts: Iterable[CropBatch]) -> None:
    """The parts, image by image one after the other, hold what the whole batch holds."""
    parts = list(parts)
    for name, count in (("global_crops", 2), ("local_crops", 3), ("masks", 2)):
        joined = torch.cat([views(getattr(part, name), count) for part in parts], dim=1)
        assert torch.equal(views(getattr(whole, name), count), joined), name
    assert torch.equal(whole.positions, torch.cat([part.positions for part in parts]))


@pytest.fixture
def source(make_images) -> FolderSource:
    return FolderSource(make_images(22))


def test_shapes_and_order_of_a_batch(source):
    batch = batches(config(batch_size=5), source)[0]
    assert batch.global_crops.shape == (10, 3, 32, 16)
    assert batch.local_crops.shape == (15, 3, 16, 8)
    assert batch.masks.shape == (10, 8)
    assert batch.positions.shape == (5,)
    assert (batch.masks.dtype, batch.mask_indices.dtype, batch.mask_weights.dtype, batch.positions.dtype) == (
        torch.bool,
        torch.int64,
        torch.float32,
        torch.int64,
    )


def test_crop_major_order_keeps_the_view_together(tmp_path):
    """Images of one colour each: the colour of every row tells which image it came from."""
    for number in range(4):
        Image.new("RGB", (20, 40), (60 * number + 10,) * 3).save(tmp_path / f"{number}.png")
    plain = {"flip": 0.0, "jitter_probability": 0.0, "grayscale": 0.0, "blur": (0.0,) * 3, "solarize": (0.0, 1.0, 0.0)}
    crops = CropsConfig(global_size=(32, 16), local_size=(16, 8), local_crops=3, **plain)
    batch = batches(config(crops=crops), FolderSource(tmp_path))[0]
    level = (batch.global_crops[:, 0] * crops.std[0] + crops.mean[0]).mean((1, 2)) * 255
    wanted = batch.positions * 60.0 + 10
    torch.testing.assert_close(level[:4], wanted, rtol=0, atol=0.1)
    torch.testing.assert_close(level[4:], torch.where(wanted >= 128, 255 - wanted, wanted), rtol=0, atol=0.1)
    local = (batch.local_crops[:, 0] * crops.std[0] + crops.mean[0]).mean((1, 2)) * 255
    torch.testing.assert_close(local, wanted.repeat(3), rtol=0, atol=0.1)


def test_mask_indices_and_weights_describe_the_masks(source):
    for batch in batches(config(batch_size=8), source):
        rebuilt = torch.zeros(batch.masks.numel())
        rebuilt[batch.mask_indices] = batch.mask_weights
        per_crop = rebuilt.view_as(batch.masks).sum(1)
        assert torch.equal(rebuilt.view_as(batch.masks) > 0, batch.masks)
        torch.testing.assert_close(per_crop, batch.masks.any(1).float())
        assert torch.equal(batch.mask_indices, batch.mask_indices.sort().values)


def test_no_local_crops(source):
    cfg = config(crops=CropsConfig(global_size=(32, 16), local_size=(16, 8), local_crops=0))
    assert batches(cfg, source)[0].local_crops is None


def test_masks_off_by_argument_and_before_the_start_epoch(source):
    assert any(batch.masks.any() for batch in batches(config(), source))
    for batch in batches(config(), source, masks_enabled=False):
        assert not batch.masks.any()
        assert batch.mask_indices.shape == batch.mask_weights.shape == (0,)
    late = config(masks=MasksConfig(start_epoch=2))
    assert not any(batch.masks.any() for batch in batches(late, source, epoch=1))
    assert any(batch.masks.any() for batch in batches(late, source, epoch=2))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(source, workers):
    expected = batches(config(), source)
    found = batches(config(workers=workers), source)
    assert len(expected) == len(found) == 5
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_epoch_is_the_tail_of_the_whole_one(source, workers, accumulate):
    cfg = config(workers=workers, accumulate=accumulate)
    expected = batches(cfg, source, epoch=3)[2 * accumulate :]
    found = batches(cfg, source, epoch=3, start_step=2)
    assert len(found) == 3 * accumulate
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


def test_two_ranks_see_what_one_rank_sees(source):
    whole = batches(config(), source)
    parts = [batches(config(), source, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert_parts_make(batch, [parts[0][step], parts[1][step]])


def test_accumulation_and_ranks_together_see_what_one_rank_sees(source):
    whole = batches(config(batch_size=8), source)
    cfg = config(batch_size=8, accumulate=2)
    parts = [batches(cfg, source, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert_parts_make(batch, [parts[rank][2 * step + micro] for micro in range(2) for rank in range(2)])


def test_an_epoch_takes_each_image_at_most_once_and_epochs_and_seeds_differ(source):
    orders = {}
    for seed in range(2):
        for epoch in range(2):
            orders[seed, epoch] = torch.cat([batch.positions for batch in batches(config(seed=seed), source, epoch)])
    for order in orders.values():
        assert len(order) == len(order.unique()) == 20
        assert order.max() < 22
    assert len({tuple(order.tolist()) for order in orders.values()}) == 4


def test_an_image_gets_other_crops_and_masks_in_another_epoch(tmp_path, write_image):
    write_image(tmp_path / "only.png", 0)
    one, other = (batches(config(batch_size=1), FolderSource(tmp_path), epoch)[0] for epoch in (0, 1))
    assert not torch.equal(one.global_crops, other.global_crops)


def test_iterating_again_starts_over(source):
    loader = build_pretrain_loader(config(), source, 0, 1, 0)
    assert len(loader) == loader.steps == 5
    assert_same(next(iter(loader)), next(iter(loader)))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(source, workers):
    before = torch.get_rng_state()
    batches(config(workers=workers), source)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_images_are_replaced_by_the_next_readable_one_and_listed(make_images, truncate, workers):
    folder = make_images(9)
    for number in (3, 4, 8):
        truncate(folder / f"{number:05}.jpg")
    source = FolderSource(folder)
    bad: list[str] = []
    used: list[int] = []
    for batch in batches(config(batch_size=3, workers=workers), source):
        bad += batch.bad
        used += batch.positions.tolist()
    # 3 -> 4 -> 5, 4 -> 5, 8 -> 0: number 4 is tried twice.
    assert sorted(used) == sorted([0, 1, 2, 5, 6, 7, 5, 5, 0])
    assert sorted(bad) == [str(folder / f"{number:05}.jpg") for number in (3, 4, 4, 8)]


def test_a_replacement_shows_the_other_image_with_crops_of_its_own(make_images, truncate):
    folder = make_images(2)
    truncate(folder / "00000.jpg")
    batch = batches(config(batch_size=2), FolderSource(folder))[0]
    assert batch.positions.tolist() == [1, 1]
    assert not torch.equal(batch.global_crops[0], batch.global_crops[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_rubbish_stops_with_the_count_and_a_command(tmp_path, workers):
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(b"rubbish")
    with pytest.raises(DataError, match="32 files in a row are unreadable") as caught:
        batches(config(workers=workers), FolderSource(tmp_path))
    assert "personvit data check" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_files_missing_from_a_list_count_as_unreadable(make_images, tmp_path):
    folder = make_images(3)
    (folder / "l.txt").write_text("00000.jpg\ngone.jpg\n00001.jpg\n00002.jpg\n")
    batch = batches(config(), ListSource(folder / "l.txt"))[0]
    assert batch.bad == [str(folder / "gone.jpg")]
    assert sorted(batch.positions.tolist()) == [0, 2, 2, 3]


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "world_size", "remedy"),
    [(2, 1, 4, 4), (4, 8, 1, 8), (10, 2, 2, 8), (9, 1, 2, 8)],
)
def test_a_batch_that_does_not_divide_is_refused_with_numbers(source, batch_size, accumulate, world_size, remedy):
    cfg = config(batch_size=batch_size, accumulate=accumulate)
    with pytest.raises(ConfigError) as caught:
        build_pretrain_loader(cfg, source, 0, world_size, 0)
    message = str(caught.value)
    assert f"train.batch_size={batch_size} " in message
    assert f"{world_size} ranks" in message
    assert f"Set train.batch_size={remedy}," in message


def test_a_source_smaller_than_a_batch_is_refused_with_a_size_that_works(source):
    with pytest.raises(DataError, match=r"22 images.*train\.batch_size=64.*Set train\.batch_size=16"):
        steps_per_epoch(config(batch_size=64), source)
    assert steps_per_epoch(config(batch_size=16), source) == 1
    with pytest.raises(DataError, match="22 images"):
        build_pretrain_loader(config(batch_size=64), source, 0, 1, 0)


def test_steps_drop_the_rest(source):
    assert [steps_per_epoch(config(batch_size=size), source) for size in (1, 7, 11, 12, 22)] == [22, 3, 2, 1, 1]


def test_to_moves_every_tensor(source):
    batch = batches(config(), source)[0]
    moved = batch.to("meta")
    for entry in dataclasses.fields(CropBatch):
        value = getattr(moved, entry.name)
        assert not isinstance(value, torch.Tensor) or value.device.type == "meta"
    assert moved.bad is batch.bad


def readers() -> list[int]:
    """Process ids of the DataLoader's workers among the children of this process."""
    tasks = Path(f"/proc/{os.getpid()}/task")
    children = [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    return [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("pt_data_worker")]


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="finds the reader processes through /proc")
def test_readers_outlive_the_signals_that_stop_the_main_process(make_images):
    """Ctrl-C and SIGTERM go to the whole process group; the step in progress still gets its data."""
    source = FolderSource(make_images(40))
    iterator = iter(build_pretrain_loader(config(workers=2), source, 0, 1, 0))
    next(iterator)
    children = readers()
    assert len(children) == 2
    for child in children:
        os.kill(child, signal.SIGTERM)
        os.kill(child, signal.SIGINT)
    assert sum(1 for _ in iterator) == 9


def test_a_program_that_ends_in_mid_epoch_does_not_hang(make_images):
    """The loader is never closed here: its frame lives to the end of the interpreter."""
    program = f"""
from personvit.config import PretrainConfig, load_config
from personvit.data.loaders import build_pretrain_loader
from personvit.data.sources import FolderSource
small = ["crops.global_size=[32,16]", "crops.local_size=[16,16]", "train.batch_size=4"]
small += ["data.num_workers=2", "data.loader=torchvision"]
cfg = load_config(PretrainConfig, overrides=small)
batches = iter(build_pretrain_loader(cfg, FolderSource({str(make_images(40))!r}), 0, 1, 0))
next(batches)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


class _Crashing(FolderSource):
    def load(self, index: int) -> Image.Image:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_reader_is_a_data_error_with_advice(make_images):
    source = _Crashing(make_images(4))
    with pytest.raises(DataError, match=r"reader process died.*data\.num_workers=0"):
        batches(config(workers=1), source)


def test_reader_count():
    assert reader_count(0) == 0
    assert reader_count(7) == 7
    assert 0 <= reader_count(-1) <= 15


def test_crops_of_a_position_do_not_depend_on_the_image_before(make_images):
    """Positions are seeded one by one: the same position of the same epoch keeps its masks in any batch size."""
    source = FolderSource(make_images(8))
    small, large = (
        torch.cat([views(batch.masks, 2) for batch in batches(config(batch_size=size), source)], dim=1)
        for size in (2, 8)
    )
    assert torch.equal(small, large)
    assert np.prod(GRID) == small.shape[2]
