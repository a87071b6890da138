from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from personvit.config.finetune import FinetuneConfig, FinetuneDataConfig, FinetuneTrainConfig, InputConfig
from personvit.data.dali_input import plain_jpeg_size
from personvit.data.finetune_batches import FinetunePlan
from personvit.data.finetune_loader import FinetuneBatch, FinetuneReader, build_finetune_loader
from personvit.data.path_sources import FileSource
from personvit.data.reid_sets import ReIDSplit
from personvit.errors import ConfigError, DataError

IDS, EACH = 6, 5
INPUT = InputConfig(size=(32, 16), pad=3)
needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="needs DALI: pip install nvidia-dali-cuda130",
)
both = pytest.mark.parametrize("loader", ["torchvision", pytest.param("dali-cpu", marks=needs_dali)])


def config(
    loader: str = "torchvision", batch_size: int = 8, workers: int = 0, inputs: InputConfig = INPUT, **train
) -> FinetuneConfig:
    return FinetuneConfig(
        data=FinetuneDataConfig(loader=loader, num_workers=workers, threads=2),
        input=inputs,
        train=FinetuneTrainConfig(batch_size=batch_size, instances=2, **train),
    )


def batches(cfg: FinetuneConfig, train: ReIDSplit, epoch: int = 0, rank: int = 0, world_size: int = 1, **kwargs):
    return list(build_finetune_loader(cfg, train, rank, world_size, epoch, **kwargs))


def assert_same(one: FinetuneBatch, other: FinetuneBatch) -> None:
    for entry in dataclasses.fields(FinetuneBatch):
        mine, theirs = getattr(one, entry.name), getattr(other, entry.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, entry.name


def assert_all_same(one: list[FinetuneBatch], other: list[FinetuneBatch]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert_same(mine, theirs)


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth colours of `size` (width, height)."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def train(tmp_path) -> ReIDSplit:
    """Six identities of five images, one identity after the other; a name has a letter beyond ASCII."""
    paths = []
    for number in range(IDS * EACH):
        path = tmp_path / f"{number // EACH:04}_c{number % 3 + 1}_ä {number:02}.jpg"
        picture(number, (20 + number, 50 + 2 * number)).save(path, quality=90)
        paths.append(str(path))
    numbers = np.arange(IDS * EACH, dtype=np.int64)
    return ReIDSplit(paths, numbers // EACH, numbers % 3)


@both
def test_shapes_labels_and_order_of_a_batch(train, loader):
    cfg = config(loader)
    for batch in batches(cfg, train):
        assert batch.images.shape == (8, 3, 32, 16)
        assert batch.images.dtype == torch.float32
        assert batch.pids.dtype == batch.camids.dtype == batch.positions.dtype == torch.int64
        assert torch.equal(batch.pids, batch.positions // EACH)
        assert torch.equal(batch.camids, batch.positions % 3)
        assert (batch.pids.view(4, 2)[:, 0] == batch.pids.view(4, 2)[:, 1]).all()
        assert len(batch.pids.unique()) == 4
        assert batch.bad == []


@both
def test_a_plain_batch_shows_the_images_it_names(train, loader):
    """Without flips, crops and erasing, each row is the resized image; DALI rounds between its two passes."""
    inputs = InputConfig(size=(64, 32), pad=0, flip=0.0, erase=0.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    for batch in batches(config(loader, inputs=inputs), train):
        for image, position in zip(batch.images, batch.positions.tolist(), strict=True):
            resized = Image.open(train.paths[position]).resize((32, 64), Image.Resampling.BICUBIC)
            difference = (image.permute(1, 2, 0) * 255 - torch.from_numpy(np.array(resized)).float()).abs()
            if loader == "torchvision":
                assert difference.max() < 1e-4
            else:
                assert difference.mean() < 0.5
                assert difference.max() < 8


@needs_dali
def test_dali_flips_shifts_and_erases_as_torchvision(train):
    """The same random numbers: erased pixels are equal bit for bit, the others up to the decoder and the filter."""
    inputs = InputConfig(size=(64, 32), erase=1.0)
    for one, other in zip(
        batches(config(inputs=inputs), train), batches(config("dali-cpu", inputs=inputs), train), strict=True
    ):
        for name in ("pids", "camids", "positions"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        difference = (one.images - other.images).abs() * 127.5
        assert difference.mean() < 0.5
        assert difference.max() < 8
        outside = one.images.abs() > 1.01  # only noise lies there
        assert outside.any()
        assert torch.equal(one.images[outside], other.images[outside])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(train, workers):
    assert_all_same(batches(config(), train), batches(config(workers=workers), train))


@needs_dali
def test_the_number_of_threads_changes_nothing(train):
    cfg = config("dali-cpu")
    other = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, threads=3, prefetch=1))
    assert_all_same(batches(cfg, train), batches(other, train))


@both
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_epoch_is_the_tail_of_the_whole_one(train, loader, world_size):
    cfg = config(loader, batch_size=4 * world_size)
    for rank in range(world_size):
        expected = batches(cfg, train, 3, rank, world_size)
        found = build_finetune_loader(cfg, train, rank, world_size, 3, start_step=2)
        assert found.steps == len(expected) > 2
        assert len(found) == found.steps - 2
        assert_all_same(list(found), expected[2:])
    assert batches(cfg, train, 3, 0, world_size, start_step=len(expected)) == []


def test_two_ranks_share_the_mini_batches_of_one(train):
    """Rank r's step s is mini-batch s * ranks + r of one rank with half the batch: same images, same random numbers."""
    whole = batches(config(batch_size=4), train)
    parts = [batches(config(), train, 0, rank, 2) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(whole) // 2
    for step in range(len(parts[0])):
        for rank in range(2):
            assert_same(parts[rank][step], whole[2 * step + rank])


def test_epochs_and_seeds_differ_and_positions_have_their_own_numbers(train):
    first = [batches(config(seed=seed), train, epoch)[0] for seed in range(2) for epoch in range(2)]
    assert len({tuple(batch.positions.tolist()) for batch in first}) == 4
    one = ReIDSplit(train.paths[:1] * 4, np.array([0, 0, 1, 1]), np.zeros(4, dtype=np.int64))
    images = batches(config(batch_size=4), one)[0].images
    assert len({image.numpy().tobytes() for image in images}) == 4


@both
def test_a_reader_gives_the_epochs_that_single_loaders_give(train, loader):
    """In order, from the middle, the same again, and one abandoned half-way."""
    cfg = config(loader, epochs=4)
    reader = FinetuneReader(cfg, train, 0, 1)
    for epoch in (0, 1, 2, 3, 1):
        part = reader.epoch(epoch)
        assert part.steps == len(part)
        assert_all_same(list(part), batches(cfg, train, epoch))
    abandoned = iter(reader.epoch(2))
    next(abandoned)
    assert_all_same(list(reader.epoch(3, start_step=1)), batches(cfg, train, 3, start_step=1))
    part = reader.epoch(0)
    assert_same(next(iter(part)), next(iter(part)))
    # The stream has served others meanwhile; the first one goes on where it was all the same.
    assert_all_same(list(abandoned), batches(cfg, train, 2, start_step=1))
    reader.close()


def readers() -> frozenset[int | None]:
    """Process ids of the DataLoader's workers."""
    return frozenset(process.pid for process in multiprocessing.active_children())


def test_reader_processes_live_from_epoch_to_epoch_and_end_with_the_last(train):
    reader = FinetuneReader(config(workers=2, epochs=3), train, 0, 1)
    seen = set()
    for epoch in range(3):  # as the training loop does, which asks for as many batches as there are and no more
        part = reader.epoch(epoch)
        taken = iter(part)
        for _ in range(part.steps):
            next(taken)
            seen.add(readers())
        del taken
    assert sorted(len(pids) for pids in seen) == [0, 2]  # none when the last batch is out
    assert not readers()
    next(iter(reader.epoch(0)))  # its iterator is gone at once: so are they
    assert not readers()


@needs_dali
def test_threads_end_with_the_iterator(train):
    before = threading.active_count()
    iterator = iter(build_finetune_loader(config("dali-cpu"), train, 0, 1, 0))
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    assert threading.active_count() == before
    batches(config("dali-cpu"), train)
    assert threading.active_count() == before


@pytest.mark.parametrize("loader", ["torchvision", pytest.param("dali-cpu", marks=needs_dali)])
def test_a_program_that_ends_in_mid_epoch_does_not_hang(train, loader):
    program = f"""
import numpy as np
from personvit.config.finetune import FinetuneConfig, FinetuneDataConfig, FinetuneTrainConfig, InputConfig
from personvit.data.finetune_loader import FinetuneReader
from personvit.data.reid_sets import ReIDSplit
cfg = FinetuneConfig(
    data=FinetuneDataConfig(loader={loader!r}, num_workers=2, threads=2),
    input=InputConfig(size=(32, 16)),
    train=FinetuneTrainConfig(batch_size=8, instances=2),
)
numbers = np.arange({IDS * EACH})
reader = FinetuneReader(cfg, ReIDSplit({train.paths!r}, numbers // {EACH}, numbers % 3), 0, 1)
batches = iter(reader.epoch(0))
next(batches)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def damage(train: ReIDSplit, truncate) -> None:
    """Identity 0: image 1 of 5 is left. Identity 2: the last image is damaged."""
    truncate(Path(train.paths[0]))
    Path(train.paths[2]).write_bytes(b"")
    Path(train.paths[3]).unlink()
    Path(train.paths[4]).write_text("<html>not found</html>")
    truncate(Path(train.paths[14]))


@both
def test_an_unreadable_image_is_replaced_by_the_next_of_its_identity_and_named(train, truncate, loader):
    sound = [batch for epoch in range(4) for batch in batches(config(loader), train, epoch)]
    damage(train, truncate)
    found = [batch for epoch in range(4) for batch in batches(config(loader), train, epoch)]
    stand_in = {0: 1, 2: 1, 3: 1, 4: 1, 14: 10}
    failed = {0: [0], 2: [2, 3, 4, 0], 3: [3, 4, 0], 4: [4, 0], 14: [14]}
    hit = set()
    for before, batch in zip(sound, found, strict=True):
        wanted = before.positions.tolist()
        hit |= set(wanted) & set(stand_in)
        assert batch.positions.tolist() == [stand_in.get(number, number) for number in wanted]
        assert batch.bad == [train.paths[bad] for number in wanted for bad in failed.get(number, [])]
        assert torch.equal(batch.pids, before.pids)
        assert torch.equal(batch.camids, batch.positions % 3)
        rows = [row for row, number in enumerate(wanted) if number not in stand_in]
        assert torch.equal(batch.images[rows], before.images[rows])
    assert {0, 14} <= hit


@both
@pytest.mark.parametrize("workers", [0, 1])
def test_an_identity_without_a_readable_image_is_an_error_with_a_command(train, loader, workers):
    for path in train.paths[:EACH]:
        Path(path).write_bytes(b"rubbish")
    reader = FinetuneReader(config(loader, workers=workers), train, 0, 1)
    with pytest.raises(DataError, match=r"none of the 5 training images.*0000_c.*personvit data check") as caught:
        [list(reader.epoch(epoch)) for epoch in range(3)]
    assert "Traceback" not in str(caught.value)


def spoil(path: str) -> None:
    """Whole to look at, but its first quantisation table has become a comment."""
    content = Path(path).read_bytes()
    place = content.index(b"\xff\xdb")
    content = content[:place] + b"\xff\xfe" + content[place + 2 :]
    assert plain_jpeg_size(content) is not None
    Path(path).write_bytes(content)


@needs_dali
def test_a_file_that_fails_in_the_pipeline_costs_nothing_but_itself(train, caplog):
    """It gets past the look at its header: the pipeline fails, is rebuilt, and every other image is what it was."""
    sound = batches(config("dali-cpu"), train) + batches(config("dali-cpu"), train, 1)
    spoil(train.paths[7])
    reader = FinetuneReader(config("dali-cpu", epochs=2), train, 0, 1)
    found = [batch for epoch in range(2) for batch in reader.epoch(epoch)]
    assert "Pillow decodes it" in caplog.text
    assert any(batch.bad for batch in found)
    for before, batch in zip(sound, found, strict=True):
        lost = before.positions == 7
        assert batch.bad == [train.paths[7]] * int(lost.sum())
        assert (batch.positions[lost] == 8).all()
        assert torch.equal(batch.images[~lost], before.images[~lost])


def dali_threads() -> int:
    count = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it may have ended by now
            count += (task / "comm").read_text().startswith("[DALI]")
    return count


@needs_dali
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads through /proc")
def test_pipelines_that_fail_are_gone_at_once(train):
    """Left to the garbage collector, they end in whatever forked process it runs in next, which then hangs."""
    gc.collect()
    before = dali_threads()
    gc.disable()
    try:
        spoil(train.paths[7])
        batches(config("dali-cpu"), train)
        assert dali_threads() == before
        for path in train.paths[:EACH]:
            Path(path).write_bytes(b"rubbish")
        with pytest.raises(DataError):
            list(FinetuneReader(config("dali-cpu"), train, 0, 1).epoch(0))
        assert dali_threads() == before
    finally:
        gc.enable()


@needs_dali
def test_other_readers_may_start_while_dali_reads_ahead(train):
    """An evaluation between two epochs does so."""
    reader = FinetuneReader(config("dali-cpu"), train, 0, 1)
    list(reader.epoch(0))
    expected = batches(config(), train)
    for _ in range(3):
        assert_all_same(batches(config(workers=2), train), expected)
    assert_all_same(list(reader.epoch(1)), batches(config("dali-cpu"), train, 1))
    reader.close()


class _Crashing(FileSource):
    def load(self, index: int) -> Image.Image:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_reader_is_a_data_error_with_advice_and_the_next_try_starts_anew(train):
    reader = FinetuneReader(config(workers=1), train, 0, 1)
    plan = reader._plan
    assert isinstance(plan, FinetunePlan)
    sound, plan.source = plan.source, _Crashing(train.paths)
    with pytest.raises(DataError, match=r"reader process died.*data\.num_workers=0"):
        list(reader.epoch(0))
    plan.source = sound
    assert_all_same(list(reader.epoch(0)), batches(config(), train))
    reader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(train, workers):
    before = torch.get_rng_state()
    batches(config(workers=workers), train)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_batch_sizes_are_refused_before_anything_is_read(train):
    with pytest.raises(ConfigError, match=r"train\.batch_size=8 .*3 mini-batches"):
        build_finetune_loader(config(), train, 0, 3, 0)
    with pytest.raises(DataError, match=r"6 training identities.*Set train\.batch_size=12"):
        build_finetune_loader(config(batch_size=16), train, 0, 1, 0)


def test_to_moves_every_tensor(train):
    batch = batches(config(), train)[0]
    moved = batch.to("meta")
    for entry in dataclasses.fields(FinetuneBatch):
        value = getattr(moved, entry.name)
        assert not isinstance(value, torch.Tensor) or value.device.type == "meta"
    assert moved.bad is batch.bad
