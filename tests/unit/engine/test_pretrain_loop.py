from __future__ import annotations

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from tiny_runs import assert_same, one_thread, tiny_config, write_crops

from personvit.data.loaders import build_pretrain_loader
from personvit.data.sources import FolderSource
from personvit.engine.checkpoint import read_checkpoint, write_checkpoint
from personvit.engine.health import HealthMonitor
from personvit.engine.step import PretrainStep, StepResult
from personvit.errors import CheckpointError, DataError, NonFiniteError
from personvit.models.weights import load_backbone
from personvit.pretrain import pretrain as pretrain_anywhere
from personvit.runtime.distributed import Ranks
from personvit.runtime.runlog import RunFolder, read_metrics

CPU = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
pretrain = functools.partial(pretrain_anywhere, ranks=CPU)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return write_crops(tmp_path_factory.mktemp("data") / "crops", count=16)


def train(cfg, crops, steps: int) -> tuple[PretrainStep, list[StepResult]]:
    """A few steps by hand."""
    source = FolderSource(crops)
    trainer = PretrainStep(cfg, CPU, steps_per_epoch=len(source) // cfg.train.batch_size)
    batches = iter(build_pretrain_loader(cfg, source, 0, 1, epoch=0))
    results = []
    for step in range(steps):
        for micro in range(cfg.train.accumulate):
            trainer.forward_backward(next(batches), step, micro)
        results.append(trainer.finish(step))
    return trainer, results


def test_accumulation_equals_the_large_batch(crops):
    # eps: where a gradient is zero but for rounding (the bias of the keys), Adam would blow that rounding up
    common = ("train.batch_size=8", "optim.eps=1e-3", "optim.warmup_epochs=0", "optim.lr=0.05")
    whole, expected = train(tiny_config(crops, *common), crops, 2)
    parts, found = train(tiny_config(crops, *common, "train.accumulate=4"), crops, 2)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose([b.loss, b.loss_cls, b.loss_patch], [a.loss, a.loss_cls, a.loss_patch], rtol=1e-6)
    for part in ("student", "teacher", "ibot_loss"):
        for name, tensor in whole.state_dict()[part].items():
            torch.testing.assert_close(parts.state_dict()[part][name], tensor, rtol=1e-6, atol=1e-6)
    fresh = PretrainStep(tiny_config(crops, *common), CPU, 2).state_dict()["student"]
    moved = max((whole.state_dict()["student"][n] - fresh[n]).abs().max() for n in fresh)
    assert moved > 1e-4  # the comparison above was about something


def test_total_is_the_weighted_sum(crops):
    _, (result,) = train(tiny_config(crops, "loss.lambda_cls=0.5", "loss.lambda_patch=2.0"), crops, 1)
    assert result.loss == pytest.approx(0.5 * result.loss_cls + 2.0 * result.loss_patch, rel=1e-6)


@pytest.mark.parametrize(("epochs", "frozen_steps"), [(0, 0), (0.5, 2), (1, 4)])
def test_prototypes_stay_for_the_first_epochs(crops, epochs, frozen_steps):
    cfg = tiny_config(crops, f"optim.freeze_last_layer_epochs={epochs}", "optim.warmup_epochs=0")
    source = FolderSource(crops)
    trainer = PretrainStep(cfg, CPU, steps_per_epoch=4)
    head = trainer.model.student.head
    before = head.last_layer.weight_v.detach().clone()
    moved = []
    for step, batch in enumerate(build_pretrain_loader(cfg, source, 0, 1, epoch=0)):
        trainer.forward_backward(batch, step, 0)
        trainer.finish(step)
        moved.append(not torch.equal(head.last_layer.weight_v, before))
    assert moved.index(True) == frozen_steps if frozen_steps < 4 else not any(moved)


def test_a_step_that_is_not_finite_changes_nothing(crops):
    cfg = tiny_config(crops)
    trainer = PretrainStep(cfg, CPU, steps_per_epoch=4)
    good, bad, *_ = build_pretrain_loader(cfg, FolderSource(crops), 0, 1, epoch=0)
    trainer.forward_backward(good, 0, 0)
    assert trainer.finish(0).finite
    before = copy.deepcopy(trainer.state_dict())
    bad.global_crops[0, 0, 0, 0] = math.nan
    trainer.forward_backward(bad, 1, 0)
    result = trainer.finish(1)
    assert not result.finite
    assert math.isnan(result.loss)
    assert_same(before, trainer.state_dict())
    trainer.forward_backward(good, 2, 0)
    assert trainer.finish(2).finite
    assert trainer.dino_loss.centre.isfinite().all()


def test_published_layout(crops, tmp_path):
    cfg = tiny_config(crops, "train.epochs=4", "train.keep_every_epochs=2")
    result = pretrain(cfg, tmp_path / "run")
    state = read_checkpoint(result.checkpoint)
    assert set(state) == {"student", "teacher", "optimizer", "epoch", "args", "ibot_loss", "personvit"}
    assert state["epoch"] == 4
    assert state["args"]["train"]["batch_size"] == 4
    assert {k: list(v.shape) for k, v in state["ibot_loss"].items()} == {"center": [1, 32], "center2": [1, 1, 32]}
    assert all(name.startswith(("module.backbone.", "module.head.")) for name in state["student"])
    teacher = set(state["teacher"])
    assert {name.removeprefix("module.") for name in state["student"]} - teacher == {"backbone.masked_embed"}
    assert {"head.last_layer.weight_g", "head.last_layer2.weight_v", "backbone.pos_embed"} <= teacher
    # numbered by the 0-based epoch, multiples of 2 but not 0
    names = sorted(path.name for path in result.checkpoint.parent.iterdir())
    assert names == ["checkpoint0002.pth", "last.pth"]
    assert read_checkpoint(result.checkpoint.with_name("checkpoint0002.pth"))["epoch"] == 3
    exported, info = load_backbone(result.backbone)
    assert info.metadata["mean"] == list(cfg.crops.mean)
    for name, tensor in exported.items():
        assert torch.equal(tensor, state["teacher"][f"backbone.{name}"]), name


def test_rows_follow_the_schedules(crops, tmp_path):
    cfg = tiny_config(crops, "train.epochs=3", "loss.teacher_temp=[0.04,0.07]", "loss.teacher_temp_warmup_epochs=2")
    pretrain(cfg, tmp_path / "run")
    rows = read_metrics(tmp_path / "run/metrics.jsonl", "train")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[0]["lr"] == 0.0
    assert rows[3]["lr"] == pytest.approx(cfg.optim.lr * 4 / 256)
    assert [row["teacher_temp"] for row in rows[::4]] == pytest.approx([0.04, 0.07, 0.07])
    assert rows[0]["wd"] == pytest.approx(0.04)
    assert rows[-1]["epoch"] == 3.0
    wanted = {"loss", "loss_cls", "loss_patch", "grad_norm", "momentum", "images_per_s", "data_wait", "memory_gb"}
    assert wanted <= set(rows[0])
    assert len(read_metrics(tmp_path / "run/metrics.jsonl", "health")) == 6


def test_max_steps_keeps_the_schedule_and_can_be_raised(crops, tmp_path):
    cfg = tiny_config(crops, "train.max_steps=3")
    result = pretrain(cfg, tmp_path / "run")
    assert result.step == 3
    more = tiny_config(crops, "train.max_steps=6")
    assert pretrain(more, tmp_path / "run", resume="auto").step == 6
    pretrain(tiny_config(crops), tmp_path / "whole")
    left = [row["loss"] for row in read_metrics(tmp_path / "run/metrics.jsonl", "train")]
    right = [row["loss"] for row in read_metrics(tmp_path / "whole/metrics.jsonl", "train")]
    assert left == right[:6]


def test_resume_of_a_finished_run_does_nothing(crops, tmp_path, caplog):
    cfg = tiny_config(crops)
    pretrain(cfg, tmp_path / "run")
    rows = (tmp_path / "run/metrics.jsonl").read_text()
    with caplog.at_level("INFO", logger="personvit"):
        pretrain(cfg, tmp_path / "run", resume="auto")
    assert "nothing left to do" in caplog.text
    assert (tmp_path / "run/metrics.jsonl").read_text() == rows


def test_rows_after_the_resumed_step_are_dropped(crops, tmp_path):
    cfg = tiny_config(crops, "train.max_steps=5")
    pretrain(cfg, tmp_path / "run")
    metrics = tmp_path / "run/metrics.jsonl"
    with metrics.open("a") as file:
        file.write(json.dumps({"step": 6, "kind": "train", "loss": 1.0}) + "\n" + '{"step": 7, "ki')
    pretrain(tiny_config(crops), tmp_path / "run", resume="auto")
    assert [row["step"] for row in read_metrics(metrics, "train")] == list(range(1, 9))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.arch=vit_tiny", "backbone.cls_token is [1, 1, 128] in it and [1, 1, 192] as configured"),
        ("head.hidden_dim=64", "head.mlp.0.weight"),
        ("train.batch_size=8", "its place in the data is lost"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(crops, tmp_path, override, words):
    pretrain(tiny_config(crops, "train.max_steps=1"), tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        pretrain(tiny_config(crops, override), tmp_path / "run", resume="auto")
    assert words in str(caught.value)


def test_a_changed_value_is_announced(crops, tmp_path, caplog):
    pretrain(tiny_config(crops, "train.max_steps=1"), tmp_path / "run")
    with caplog.at_level("WARNING", logger="personvit"):
        pretrain(tiny_config(crops, "optim.lr=0.001", "train.max_steps=2"), tmp_path / "run", resume="auto")
    assert "optim.lr was 0.0005, is now 0.001" in caplog.text
    assert "max_steps" not in caplog.text


def test_steps_in_a_row_that_are_not_finite_stop_the_run(crops, tmp_path):
    pretrain(tiny_config(crops, "train.max_steps=2"), tmp_path / "run")
    last = tmp_path / "run/checkpoints/last.pth"
    state = read_checkpoint(last)
    state["student"]["module.backbone.norm.weight"].fill_(math.nan)
    write_checkpoint(last, state)
    with pytest.raises(NonFiniteError) as caught:
        pretrain(tiny_config(crops, "train.non_finite_limit=3"), tmp_path / "run", resume="auto")
    assert "3 steps in a row" in str(caught.value)
    assert "optim.lr=0.00025" in str(caught.value)
    files = sorted((tmp_path / "run/non_finite").iterdir())
    assert [file.name for file in files] == ["step0000003.pt", "step0000004.pt", "step0000005.pt"]
    (batch,) = torch.load(files[0], weights_only=True)["micro_batches"]
    assert batch["global_crops"].shape == (8, 3, 32, 16)
    assert [path.startswith(str(crops)) for path in batch["paths"]] == [True] * 4
    rows = read_metrics(tmp_path / "run/metrics.jsonl", "train")
    assert rows[-1]["loss"] is None
    assert rows[-1]["skipped"] == 2


def test_collapse_is_told_once_in_ten_rows(crops, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(HealthMonitor, "warnings", lambda self: ["collapse"] if self._rows != 4 else [])
    cfg = tiny_config(crops, "health.every=1", "train.epochs=4")
    pretrain(cfg, tmp_path / "run")
    told = [record.args[0] for record in caplog.records if record.msg.startswith("health")]
    assert told == [1, 5, 15]


def test_snapshot_path_is_numbered_as_published():
    assert RunFolder("runs/a").snapshot(220).as_posix() == "runs/a/checkpoints/checkpoint0220.pth"


def test_a_probe_that_fails_does_not_end_the_run(crops, tmp_path, caplog, monkeypatch):
    def broken(self, backbone):
        raise DataError("query/0001_c1s1_000001_00.jpg: cannot be read as an image")

    monkeypatch.setattr("personvit.engine.probe.RetrievalProbe.__init__", lambda self, *args: None)
    monkeypatch.setattr("personvit.engine.probe.RetrievalProbe.run", broken)
    cfg = tiny_config(crops, "data.probe_root=anywhere", "health.probe_every_epochs=1")
    with caplog.at_level("WARNING", logger="personvit"):
        result = pretrain(cfg, tmp_path / "run")
    assert result.step == 8
    assert "no probe at epoch 1: query/0001_c1s1_000001_00.jpg" in caplog.text


def test_saving_every_few_epochs(crops, tmp_path, monkeypatch):
    written = []

    def count(path, state):
        written.append(state["epoch"])
        write_checkpoint(path, state)

    monkeypatch.setattr("personvit.engine.pretrain_loop.write_checkpoint", count)
    cfg = tiny_config(crops, "train.epochs=5", "train.save_every_epochs=2", "train.keep_every_epochs=2")
    result = pretrain(cfg, tmp_path / "run")
    assert written == [2, 3, 4, 5]  # 3: a snapshot is due; 5: the end
    assert read_checkpoint(result.checkpoint)["epoch"] == 5
