"""`personvit pretrain` from the command line to the exported backbone."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_runs import arguments, finish, start, write_crops

from personvit.config import PretrainConfig, load_config
from personvit.engine.checkpoint import read_checkpoint
from personvit.models.weights import load_model
from personvit.pretrain import main
from personvit.runtime.entry import run
from personvit.runtime.runlog import read_metrics


@pytest.fixture
def crops(tmp_path):
    return write_crops(tmp_path / "crops", count=12)


def test_run_folder(crops, tmp_path):
    out = tmp_path / "run"
    (crops / "truncated.jpg").write_bytes((crops / "0001.jpg").read_bytes()[:200])
    output = finish(start(crops, out, "data.num_workers=1"))
    assert "no --config: recipe demo" in output
    assert "step 6/6" in output
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("tensorboard/events")}
    assert len(events) == 1
    assert files - events == {
        "config.yaml",
        "resolved.yaml",
        "metrics.jsonl",
        "train.log",
        "checkpoints/last.pth",
        "exported/backbone.safetensors",
        "bad_images.txt",
    }
    assert (out / "bad_images.txt").read_text() == f"{crops / 'truncated.jpg'}\n"
    assert "1 unreadable image(s)" in output
    given, resolved = (load_config(PretrainConfig, str(out / name)) for name in ("config.yaml", "resolved.yaml"))
    assert given == resolved
    assert "non_finite_limit" not in (out / "config.yaml").read_text()
    assert "step 6/6" in (out / "train.log").read_text()
    model = load_model(out / "exported/backbone.safetensors")
    assert model.embed(torch.zeros(2, 3, 32, 16)).shape == (2, 128)
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_second_run_in_the_same_folder(crops, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(main, arguments(crops, out)) == 0
    (out / "notes.txt").write_text("mine")
    assert run(main, arguments(crops, out)) == 5
    assert "--overwrite" in capsys.readouterr().err
    assert run(main, arguments(crops, out, "--overwrite", "train.max_steps=2")) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl", "train")] == [1, 2]
    # resuming without --config takes the run's own configuration
    assert run(main, ["--out", str(out), "--resume", "auto", "train.max_steps=4"]) == 0
    assert read_checkpoint(out / "checkpoints/last.pth")["personvit"]["step"] == 4


def test_resume_auto_without_a_checkpoint_starts_anew(crops, tmp_path, caplog):
    with caplog.at_level("INFO", logger="personvit"):
        assert run(main, arguments(crops, tmp_path / "run", "--resume", "auto", "train.max_steps=1")) == 0
    assert "the run starts anew" in caplog.text


def test_a_diverging_run_stops_with_advice(crops, tmp_path, capsys):
    extra = ["optim.lr=1e30", "optim.warmup_epochs=0", "train.epochs=4", "train.non_finite_limit=2"]
    assert run(main, arguments(crops, tmp_path / "run", *extra)) == 7
    message = capsys.readouterr().err
    assert "2 steps in a row" in message
    assert "optim.lr=5e+29" in message
    assert len(list((tmp_path / "run/non_finite").iterdir())) == 2


def test_initial_weights(crops, tmp_path):
    assert run(main, arguments(crops, tmp_path / "first", "optim.lr=0.05")) == 0
    weights = tmp_path / "first/exported/backbone.safetensors"
    extra = [f"model.weights={weights}", "train.max_steps=1", "optim.lr=1e-12"]
    assert run(main, arguments(crops, tmp_path / "second", *extra)) == 0
    first, second = (load_model(tmp_path / name / "exported/backbone.safetensors") for name in ("first", "second"))
    for (name, left), right in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6, msg=name)


def test_full_disk_during_the_run(crops, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(main, arguments(crops, out, "train.max_steps=2")) == 0
    before = (out / "checkpoints/last.pth").read_bytes()
    (out / "checkpoints/.last.pth.part").symlink_to("/dev/full")
    assert run(main, arguments(crops, out, "--resume", "auto", "train.max_steps=4")) == 4
    assert "No space left on device" in capsys.readouterr().err
    assert (out / "checkpoints/last.pth").read_bytes() == before
    assert run(main, arguments(crops, out, "--resume", "auto", "train.max_steps=4")) == 0


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_sinkhorn_separate_heads_and_no_local_crops(crops, tmp_path, precision):
    sinkhorn = ["loss.centering=sinkhorn", "loss.patch_centering=sinkhorn"]
    extra = [*sinkhorn, "head.shared=false", "head.patch_prototypes=48", "crops.local_crops=0"]
    extra += [f"train.precision={precision}", "masks.shape=rand", "masks.start_epoch=1", "train.epochs=3"]
    assert run(main, arguments(crops, tmp_path / "run", *extra)) == 0
    rows = read_metrics(tmp_path / "run/metrics.jsonl", "train")
    assert [row["loss_patch"] for row in rows[:3]] == [0.0, 0.0, 0.0]  # nothing is masked in the first epoch
    assert max(row["loss_patch"] for row in rows[3:]) > 0
