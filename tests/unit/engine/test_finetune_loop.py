from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os

import numpy as np
import pytest
import torch
from tiny_finetune import tiny_config, write_persons
from tiny_runs import assert_same, one_thread, train_rows

from personvit.config import load_config
from personvit.engine import finetune_loop, run
from personvit.engine.checkpoint import read_checkpoint, write_checkpoint
from personvit.engine.finetune_data import open_finetune_data
from personvit.engine.finetune_loop import FinetuneRun
from personvit.engine.finetune_step import FinetuneStep
from personvit.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from personvit.finetune import finetune as finetune_anywhere
from personvit.models.weights import load_backbone, load_reid
from personvit.optim import finetune_lr
from personvit.runtime.distributed import Ranks
from personvit.runtime.runlog import FinetuneFolder, read_metrics

CPU = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
finetune = functools.partial(finetune_anywhere, ranks=CPU)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def persons(tmp_path_factory):
    return write_persons(tmp_path_factory.mktemp("data") / "persons")


@pytest.fixture(scope="module")
def whole(persons, tmp_path_factory):
    """An uninterrupted run."""
    package = logging.getLogger("personvit")
    before = package.level
    package.setLevel(logging.INFO)
    with one_thread():
        out = tmp_path_factory.mktemp("runs") / "whole"
        finetune(tiny_config(persons), out)
    package.setLevel(before)
    return out


def prepared(persons, *overrides):
    """A training step and the batches of the first epoch."""
    cfg = tiny_config(persons, *overrides)
    data = open_finetune_data(cfg)
    trainer = FinetuneStep(cfg, CPU, data.num_ids, data.num_cameras)
    return trainer, list(finetune_loop.FinetuneReader(cfg, data.train, 0, 1).epoch(0))


class StopAfter:
    """In place of the signals: one arrives during step `after`."""

    after = 0

    def __init__(self):
        self.asked = 0

    @property
    def received(self):
        self.asked += 1
        return "SIGTERM" if self.asked >= self.after else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def stop_after(monkeypatch, steps):
    monkeypatch.setattr(StopAfter, "after", steps)
    monkeypatch.setattr(run, "StopSignal", StopAfter)


def test_total_is_the_weighted_sum_and_each_group_has_its_rate(persons):
    trainer, batches = prepared(persons, "loss.identity=0.5", "loss.triplet=2.0", "optim.warmup_epochs=2")
    trainer.forward_backward(batches[0], 0)
    result = trainer.finish(1)
    assert result.loss == pytest.approx(0.5 * result.loss_id + 2.0 * result.loss_triplet, rel=1e-6)
    assert result.loss_id == pytest.approx(math.log(8), rel=0.05)  # 8 identities, a classifier that knows nothing
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == finetune_lr(trainer.cfg.optim, 3)[1].tolist()
    assert rates[0] != rates[1]


def test_gradient_is_clipped_only_if_wanted(persons):
    moved = []
    for limit in (0.0, 1e-3):
        trainer, batches = prepared(persons, f"optim.clip_grad={limit}", "optim.weight_decay=0.0")
        before = trainer.model.base.norm.weight.detach().clone()
        trainer.forward_backward(batches[0], 0)
        assert trainer.finish(1).grad_norm > 0.1  # before clipping, in both
        moved.append((trainer.model.base.norm.weight.detach() - before).abs().max().item())
    assert moved[1] < 0.1 * moved[0]


def test_drop_path_depends_on_the_position_only(persons):
    losses = []
    for step, draws in ((3, 0), (3, 5), (4, 0)):
        trainer, batches = prepared(persons)
        torch.rand(draws)
        trainer.forward_backward(batches[0], step)
        losses.append(trainer.finish(0).loss)
    assert losses[0] == losses[1] != losses[2]


def test_a_step_that_is_not_finite_changes_nothing(persons):
    trainer, (good, bad, *_) = prepared(persons)
    trainer.forward_backward(good, 0)
    assert trainer.finish(0).finite
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    momentum = [s["momentum_buffer"].clone() for s in trainer.optimizer.state_dict()["state"].values()]
    bad.images[0, 0, 0, 0] = math.nan
    trainer.forward_backward(bad, 1)
    result = trainer.finish(0)
    assert not result.finite
    assert math.isnan(result.loss)
    assert_same(before, dict(trainer.model.state_dict()))  # the running statistics of the neck included
    assert_same(momentum, [s["momentum_buffer"] for s in trainer.optimizer.state_dict()["state"].values()])
    trainer.forward_backward(good, 2)
    assert trainer.finish(0).finite


def test_rows_follow_schedule_and_evaluations(persons, whole):
    rows = read_metrics(whole / "metrics.jsonl", "train")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    wanted = {"loss", "loss_id", "loss_triplet", "accuracy", "grad_norm", "lr", "images_per_s", "data_wait"}
    assert wanted <= set(rows[0])
    lr = finetune_lr(tiny_config(persons).optim, 3)[:, 0]
    assert [row["lr"] for row in rows] == [lr[math.ceil(row["epoch"]) - 1] for row in rows]
    assert rows[-1]["epoch"] == 3.0
    evaluations = read_metrics(whole / "metrics.jsonl", "eval")
    assert [row["epoch"] for row in evaluations] == [1, 2, 3]
    assert {"mAP", "rank1", "rank5", "rank10", "mINP", "data"} <= set(evaluations[0])


def test_files_of_a_run_describe_themselves(persons, whole):
    state = read_checkpoint(whole / "checkpoints/last.pth")
    assert set(state) == {"state_dict", "optimizer", "epoch", "args", "personvit"}
    assert state["epoch"] == 3
    names = set(state["state_dict"])
    assert {"base.cls_token", "base.blocks.3.mlp.fc2.bias", "bottleneck.running_var", "classifier.weight"} <= names
    exported, info = load_reid(whole / "exported/model.safetensors")
    assert_same(dict(exported.state_dict()), dict(state["state_dict"]))
    assert_same(dict(load_reid(whole / "checkpoints/last.pth")[0].state_dict()), dict(exported.state_dict()))
    assert (info.image_size, info.mean) == ((32, 16), (0.5, 0.5, 0.5))
    assert info.metadata["data"] == ["market1501"]
    assert info.metadata["recipe"]["optim"]["lr"] == 0.01
    last = read_metrics(whole / "metrics.jsonl", "eval")[-1]
    assert info.metadata["metrics"]["market1501"]["mAP"] == last["mAP"]
    assert load_backbone(whole / "exported/best.safetensors")[1].image_size == (32, 16)


def test_report_at_the_end(whole):
    report = json.loads((whole / "evaluation.json").read_text())
    (figures,) = report["evaluations"]
    assert figures["mAP"] == read_metrics(whole / "metrics.jsonl", "eval")[-1]["mAP"]
    assert (figures["rerank"]["k1"], figures["rerank"]["k2"]) == (4, 2)
    assert figures["protocol"] == "market"
    log = (whole / "train.log").read_text()
    assert "rr-: after k-reciprocal re-ranking, k1=4 k2=2" in log
    assert "(protocol market)" in log
    assert "32 images of 8 identities, batch 8 = 1 rank(s) x 4 identities x 2 images" in log
    assert "train          8       32        2" in log


@pytest.mark.parametrize("steps", [1, 6])
def test_resumed_run_equals_uninterrupted_run(persons, whole, tmp_path, monkeypatch, steps):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        result = finetune(tiny_config(persons), out)
    assert result.interrupted
    assert (result.step, result.evaluations) == (steps, [])
    assert read_checkpoint(out / "checkpoints/last.pth")["personvit"]["epoch_step"] > 0  # in the middle of an epoch
    assert not finetune(tiny_config(persons), out, resume="auto").interrupted
    assert_same(read_checkpoint(whole / "checkpoints/last.pth"), read_checkpoint(out / "checkpoints/last.pth"))
    assert_same(read_checkpoint(whole / "checkpoints/best.pth"), read_checkpoint(out / "checkpoints/best.pth"))
    assert train_rows(whole / "metrics.jsonl") == train_rows(out / "metrics.jsonl")


@pytest.mark.parametrize("epoch", [1, 3])
def test_an_evaluation_that_a_signal_prevented_is_made_up_for(persons, whole, tmp_path, monkeypatch, epoch):
    out = tmp_path / "run"
    steps = max(row["step"] for row in read_metrics(whole / "metrics.jsonl", "train") if row["epoch"] <= epoch)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        assert finetune(tiny_config(persons), out).interrupted
    assert len(read_metrics(out / "metrics.jsonl", "eval")) == epoch - 1
    # killed between the row and the checkpoint: the row is there already
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": steps, "kind": "eval", "mAP": 0.9}) + "\n")
    result = finetune(tiny_config(persons), out, resume="auto")
    assert len(result.evaluations) == 1
    assert train_rows(whole / "metrics.jsonl") == train_rows(out / "metrics.jsonl")
    assert_same(read_checkpoint(whole / "checkpoints/last.pth"), read_checkpoint(out / "checkpoints/last.pth"))


def test_resume_of_a_finished_run_does_nothing(persons, tmp_path, caplog):
    cfg = tiny_config(persons, "train.epochs=1")
    finetune(cfg, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*") if path.is_file()}
    with caplog.at_level("INFO", logger="personvit"):
        finetune(cfg, tmp_path / "run", resume="auto")
    assert "nothing left to do" in caplog.text
    for name in ("metrics.jsonl", "evaluation.json", "checkpoints/last.pth", "exported/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == before[tmp_path / "run" / name]


def test_max_steps_can_be_raised(persons, whole, tmp_path):
    out = tmp_path / "run"
    assert finetune(tiny_config(persons, "train.max_steps=5"), out).step == 5
    assert json.loads((out / "evaluation.json").read_text())["step"] == 5
    finetune(tiny_config(persons), out, resume="auto")
    left, right = (read_checkpoint(folder / "checkpoints/last.pth") for folder in (out, whole))
    assert_same(left["state_dict"], right["state_dict"])
    assert json.loads((out / "evaluation.json").read_text())["step"] == right["personvit"]["step"]


def test_the_best_model_is_kept(persons, tmp_path, monkeypatch):
    figures = iter([0.3, 0.5, 0.5])
    real = finetune_loop.FinetuneEvaluator.run

    def pretend(self, model, text, *, rerank):
        (one,) = real(self, model, text, rerank=rerank)
        result = dataclasses.replace(one.plain.result, mAP=next(figures))
        return [dataclasses.replace(one, plain=dataclasses.replace(one.plain, result=result))]

    monkeypatch.setattr(finetune_loop.FinetuneEvaluator, "run", pretend)
    out = tmp_path / "run"
    result = finetune(tiny_config(persons), out)
    best, last = (read_checkpoint(out / f"checkpoints/{name}.pth") for name in ("best", "last"))
    assert (best["epoch"], last["epoch"]) == (2, 3)  # of two equal ones the earlier
    assert last["personvit"]["best"]["mAP"] == 0.5
    assert_same(dict(load_reid(result.best)[0].state_dict()), dict(best["state_dict"]))
    assert load_reid(result.best)[1].metadata["epoch"] == 2
    assert_same(dict(load_reid(result.model)[0].state_dict()), dict(last["state_dict"]))


def test_an_unreadable_test_image_ends_the_run_only_at_its_end(tmp_path, caplog):
    persons = write_persons(tmp_path / "persons")
    victim = sorted((persons / "query").iterdir())[3]
    picture = victim.read_bytes()
    victim.write_bytes(b"not a picture")
    out = tmp_path / "run"
    with caplog.at_level("WARNING", logger="personvit"), pytest.raises(DataError, match=victim.name):
        finetune(tiny_config(persons, "train.epochs=2"), out)
    assert "no evaluation at epoch 1" in caplog.text
    assert read_checkpoint(out / "checkpoints/last.pth")["epoch"] == 2
    assert load_reid(out / "exported/model.safetensors")[1].metadata["epoch"] == 2
    victim.write_bytes(picture)
    assert len(finetune(tiny_config(persons, "train.epochs=2"), out, resume="auto").evaluations) == 1


def test_an_unreadable_training_image_is_named(tmp_path):
    persons = write_persons(tmp_path / "persons")
    victim = sorted((persons / "bounding_box_train").iterdir())[3]
    victim.write_bytes(b"not a picture")
    finetune(tiny_config(persons, "train.epochs=2"), tmp_path / "run")
    assert (tmp_path / "run/bad_images.txt").read_text() == f"{victim}\n"


def test_steps_in_a_row_that_are_not_finite_stop_the_run(persons, tmp_path):
    finetune(tiny_config(persons, "train.max_steps=1"), tmp_path / "run")
    last = tmp_path / "run/checkpoints/last.pth"
    state = read_checkpoint(last)
    state["state_dict"]["base.norm.weight"].fill_(math.nan)
    write_checkpoint(last, state)
    with pytest.raises(NonFiniteError) as caught:
        finetune(tiny_config(persons, "train.non_finite_limit=2"), tmp_path / "run", resume="auto")
    assert "2 steps in a row" in str(caught.value)
    assert "optim.lr=0.005" in str(caught.value)
    files = sorted((tmp_path / "run/non_finite").iterdir())
    assert [file.name for file in files] == ["step0000002.pt", "step0000003.pt"]
    (batch,) = torch.load(files[0], weights_only=True)["micro_batches"]
    assert batch["images"].shape == (8, 3, 32, 16)
    names = [os.path.basename(path) for path in batch["paths"]]
    assert [int(name[:4]) - 1 for name in names] == batch["pids"].tolist()
    assert read_metrics(tmp_path / "run/metrics.jsonl", "train")[-1]["skipped"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["train.batch_size=4"], "train.batch_size=8, now it is 4"),
        (["train.batch_size=16", "train.instances=4"], "Use train.batch_size=8"),
        (["model.arch=vit_tiny"], "state_dict base.cls_token is [1, 1, 128] in it and [1, 1, 192] as configured"),
        (["model.camera_embed=true"], "base.sie_embed is missing"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(persons, whole, change, words):
    with pytest.raises(CheckpointError) as caught:
        FinetuneRun(tiny_config(persons, *change), FinetuneFolder(whole), CPU, "auto")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "first", "words"), [(9, 1, "36 of 9: the images differ"), (8, 50, "32 of 8: identities or cameras differ")]
)
def test_another_training_set_is_refused(whole, tmp_path, ids, first, words):
    other = write_persons(tmp_path / "other", ids=ids, first=first)
    with pytest.raises(CheckpointError, match=words):
        FinetuneRun(tiny_config(other), FinetuneFolder(whole), CPU, "auto")


def test_a_changed_value_is_announced(persons, whole, caplog):
    with caplog.at_level("WARNING", logger="personvit"):
        changed = tiny_config(persons, "optim.lr=0.1", "eval.every_epochs=2")
        FinetuneRun(changed, FinetuneFolder(whole), CPU, "auto")
    assert "optim.lr was 0.01, is now 0.1" in caplog.text
    assert "every_epochs" not in caplog.text


def test_several_sets_are_joined_and_evaluated_apart(persons, tmp_path, caplog):
    other = write_persons(tmp_path / "other", ids=5, first=101)
    cfg = tiny_config(persons, "data.name=market1501,dukemtmcreid", f"data.root={persons},{other}", "train.epochs=1")
    with caplog.at_level("INFO", logger="personvit"):
        result = finetune(cfg, tmp_path / "run")
    assert [one.reid_set.name for one in result.evaluations] == ["market1501", "dukemtmcreid"]
    assert load_reid(result.model)[1].num_ids == 13
    rows = read_metrics(tmp_path / "run/metrics.jsonl", "eval")
    assert [(row["data"], row["mAP"]) for row in rows] == [
        (one.reid_set.name, one.result.mAP) for one in result.evaluations
    ]
    report = next(record.getMessage() for record in caplog.records if "rr-mAP" in record.getMessage())
    assert [line.split()[0] for line in report.splitlines()[:3]] == ["data", "market1501", "dukemtmcreid"]


def test_tables_name_training_and_test_sets(persons, tmp_path):
    other = write_persons(tmp_path / "other", ids=5, first=101)
    data = open_finetune_data(tiny_config(persons, "data.test_name=dukemtmcreid", f"data.test_root={other}"))
    assert [len(data.train), data.num_ids] == [32, 8]
    assert [table.split()[0] for table in data.tables()] == ["market1501", "dukemtmcreid"]
    assert [one.name for one in data.testing] == ["dukemtmcreid"]


def test_cameras_of_joined_sets_are_numbered_alike_in_evaluation(persons, tmp_path):
    other = write_persons(tmp_path / "other", ids=5, first=101)
    both = ["data.name=market1501,dukemtmcreid", f"data.root={persons},{other}", "model.camera_embed=true"]
    data = open_finetune_data(tiny_config(persons, *both))
    assert data.num_cameras == 4
    assert np.unique(data.train.camids[32:]).tolist() == [2, 3]
    assert [np.unique(one.gallery.camids).tolist() for one in data.testing] == [[0, 1], [2, 3]]
    assert [np.unique(one.query.camids).tolist() for one in data.testing] == [[0, 1], [2, 3]]
    with pytest.raises(ConfigError, match=r"dukemtmcreid in .* has other cameras"):
        open_finetune_data(
            tiny_config(persons, "model.camera_embed=true", "data.test_name=dukemtmcreid", f"data.test_root={other}")
        )


def test_camera_embeddings_are_trained_and_exported(persons, tmp_path):
    result = finetune(tiny_config(persons, "model.camera_embed=true", "train.epochs=1"), tmp_path / "run")
    model, _ = load_reid(result.model)
    assert model.base.sie_embed.shape == (2, 1, 128)
    start = FinetuneStep(tiny_config(persons, "model.camera_embed=true"), CPU, 8, 2).model.base.sie_embed
    assert (model.base.sie_embed - start).abs().max() > 1e-6


def test_checkpoints_are_written_as_often_as_asked(persons, tmp_path, monkeypatch):
    written = []

    def count(path, state):
        written.append((path.name, state["epoch"], state["personvit"]["evaluated"]))
        write_checkpoint(path, state)

    monkeypatch.setattr("personvit.engine.finetune_loop.write_checkpoint", count)
    cfg = tiny_config(persons, "train.epochs=4", "train.save_every_epochs=2", "eval.every_epochs=0")
    steps = finetune(cfg, tmp_path / "run").step
    assert written == [("last.pth", 2, 0), ("last.pth", 4, 0), ("best.pth", 4, steps)]
    assert read_checkpoint(tmp_path / "run/checkpoints/last.pth")["personvit"]["evaluated"] == steps


def test_run_starts_from_weights_and_says_what_it_took(persons, whole, tmp_path, caplog):
    weights = whole / "exported/model.safetensors"
    cfg = tiny_config(persons, f"model.weights={weights}", "input.size=[48,24]", "train.max_steps=1")
    with caplog.at_level("INFO", logger="personvit"):
        started = FinetuneRun(cfg, FinetuneFolder(tmp_path / "run"), CPU)
        started._log_plan()
    assert "resized" in caplog.text
    state = started.trainer.model.state_dict()
    expected, _ = load_backbone(weights, (48, 24))
    assert_same({name: state[f"base.{name}"] for name in expected}, expected)


def test_bf16_and_smoothing_and_margin(persons, tmp_path):
    extra = ["train.precision=bf16", "loss.label_smoothing=0.1", "loss.margin=0.3", "train.max_steps=2"]
    cfg = tiny_config(persons, *extra, "model.neck_feat=after", "eval.rerank.enabled=false", "model.dropout=0.1")
    result = finetune(cfg, tmp_path / "run")
    assert load_reid(result.model)[0].neck_feat == "after"
    assert result.evaluations[0].reranked is None
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run/metrics.jsonl", "train"))
    given = load_config(type(cfg), str(tmp_path / "run/config.yaml"))
    assert given == cfg
