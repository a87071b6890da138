"""What bad files, odd trees, packed shards and a slow loader do to a whole pre-training run."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import ROOT, arguments, finish, start, tiny_config, write_crops

from personvit.data.batches import BatchPlan
from personvit.data.sources import FolderSource
from personvit.engine import pretrain_loop
from personvit.engine.step import PretrainStep
from personvit.pretrain import main
from personvit.runtime.entry import run
from personvit.runtime.runlog import read_metrics

needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="needs DALI: pip install nvidia-dali-cuda130",
)
LOADERS = ["torchvision", pytest.param("dali-cpu", marks=needs_dali)]

IMAGES, BATCH = 300, 20


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return write_crops(tmp_path_factory.mktemp("data") / "crops", count=IMAGES)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _spoil(path: Path) -> None:
    """Whole to look at, but a quantisation table has become a comment: only a decoder notices."""
    content = path.read_bytes()
    place = content.index(b"\xff\xdb")
    path.write_bytes(content[:place] + b"\xff\xfe" + content[place + 2 :])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Numbers of the images of every step that was trained on."""
    found: list[list[int]] = []
    train = PretrainStep.forward_backward

    def record(self, batch, step, micro):
        found.append(batch.positions.tolist())
        return train(self, batch, step, micro)

    monkeypatch.setattr(PretrainStep, "forward_backward", record)
    return found


@pytest.mark.parametrize("loader", LOADERS)
def test_one_percent_bad_files_cost_nothing_but_themselves(crops, tmp_path, loader, seen):
    """Two epochs over 300 images, 3 of them bad, two side by side: the other 297 are all trained on in each."""
    root, out = shutil.copytree(crops, tmp_path / "crops"), tmp_path / "run"
    bad = {17: _cut, 18: lambda path: path.write_bytes(b""), 230: _spoil}
    for number, damage in bad.items():
        damage(root / f"{number:04}.jpg")
    extra = [f"train.batch_size={BATCH}", "train.epochs=2", f"data.loader={loader}", "data.threads=2"]
    assert run(main, arguments(root, out, *extra)) == 0
    cfg, source = tiny_config(root, *extra), FolderSource(root)
    steps = IMAGES // BATCH
    assert len(seen) == 2 * steps
    for epoch in range(2):
        plan = BatchPlan(cfg, source, 0, 1, epoch)
        wanted = [plan.images(step) for step in range(steps)]
        assert sorted(itertools.chain(*wanted)) == list(range(IMAGES))
        successor = {17: 19, 18: 19, 230: 231}
        expected = [[successor.get(image, image) for image in images] for images in wanted]
        assert seen[epoch * steps : (epoch + 1) * steps] == expected
        counts = Counter(itertools.chain(*expected))
        assert set(counts) == set(range(IMAGES)) - bad.keys()
        assert {image for image, count in counts.items() if count > 1} == {19, 231}
    named = (out / "bad_images.txt").read_text().splitlines()
    assert sorted(named) == [str(root / f"{number:04}.jpg") for number in sorted(bad)]


@needs_dali
def test_pack_and_pretrain_on_the_shards_through_dali(crops, tmp_path):
    """The two commands of the documentation, with one bad file that packing leaves out."""
    root = tmp_path / "crops"
    root.mkdir()
    for number in range(12):
        shutil.copy(crops / f"{number:04}.jpg", root)
    _cut(root / "0005.jpg")
    shards = tmp_path / "shards"
    command = [sys.executable, "-m", "personvit", "data", "pack", str(shards), str(root), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert "0005.jpg" in (shards / "bad_images.txt").read_text()
    out = tmp_path / "run"
    output = finish(start(shards, out, "data.loader=dali-cpu", "data.threads=1", "train.max_steps=2"))
    assert "11 images" in output
    assert "step 2/2" in output
    rows = read_metrics(out / "metrics.jsonl", "train")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert not (out / "bad_images.txt").exists()


def test_a_tree_of_very_many_empty_folders_trains_on_its_few_images(crops, tmp_path):
    """20,000 folders, nested and side by side; four images at their ends."""
    root = tmp_path / "tree"
    for outer in range(100):
        (root / f"{outer:03}").mkdir(parents=True)
        for inner in range(200):
            os.mkdir(root / f"{outer:03}" / f"{inner:03}")
    for number, place in enumerate(("000/000", "050/100", "099/198", "099/199")):
        shutil.copy(crops / f"{number:04}.jpg", root / place / "x y.jpg")
    begin = time.perf_counter()
    source = FolderSource(root)
    assert time.perf_counter() - begin < 10
    assert [Path(source.path(i)).parent.name for i in range(len(source))] == ["000", "100", "198", "199"]
    assert run(main, arguments(root, tmp_path / "run", "train.max_steps=2", "data.loader=torchvision")) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl", "train")] == [1, 2]


class _Slow:
    """A loader whose every batch comes late."""

    def __init__(self, loader, delay: float) -> None:
        self._loader, self._delay = loader, delay

    def __iter__(self):
        for batch in self._loader:
            time.sleep(self._delay)
            yield batch


def test_data_wait_is_the_time_that_steps_wait_for_the_loader(crops, tmp_path, monkeypatch, caplog):
    """Rows and progress line say so, for windows of two steps of two micro-batches."""
    delay, build = 0.15, pretrain_loop.build_pretrain_loader
    monkeypatch.setattr(
        pretrain_loop, "build_pretrain_loader", lambda *args, **options: _Slow(build(*args, **options), delay)
    )
    extra = ["train.accumulate=2", "train.max_steps=6", "train.log_every=2", "data.loader=torchvision"]
    with caplog.at_level("INFO", logger="personvit"):
        assert run(main, arguments(crops, tmp_path / "run", *extra)) == 0
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl", "train") if row["step"] > 2]
    assert [row["step"] for row in rows] == [4, 6]
    for row in rows:
        window = 2 * 4 / row["images_per_s"]  # seconds of two steps of four images
        waited = row["data_wait"] * window
        assert 4 * delay <= waited < 6 * delay
        assert row["data_wait"] < 1
    shown = [int(share) for share in re.findall(r"wait (\d+)%", caplog.text)]
    assert shown[-2:] == [pytest.approx(100 * row["data_wait"], abs=1) for row in rows]


def test_a_loader_that_keeps_up_makes_no_step_wait(crops, tmp_path, monkeypatch):
    train = PretrainStep.forward_backward

    def slow(self, batch, step, micro):
        time.sleep(0.1)  # the loader works ahead meanwhile
        return train(self, batch, step, micro)

    monkeypatch.setattr(PretrainStep, "forward_backward", slow)
    extra = ["train.max_steps=6", "data.loader=torchvision", "data.num_workers=1"]
    assert run(main, arguments(crops, tmp_path / "run", *extra)) == 0
    waits = [row["data_wait"] for row in read_metrics(tmp_path / "run/metrics.jsonl", "train")]
    assert sorted(waits[2:])[1] < 0.2  # one may be late on a busy machine
