"""An interrupted run that is continued equals the uninterrupted one, bit for bit on the CPU."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tiny_runs import assert_same, finish, start, train_rows, wait_for_step, write_crops

from personvit.engine.checkpoint import read_checkpoint
from personvit.errors import EXIT_INTERRUPTED

# 8 steps an epoch; saved after steps 3, 6, 8, 11 ..., so a crash lies in the middle of an epoch and between two saves
RUN = ["train.batch_size=4", "train.accumulate=2", "train.epochs=3", "train.save_every_steps=3", "model.drop_path=0.2"]


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return write_crops(tmp_path_factory.mktemp("data") / "crops", count=32)


@pytest.fixture(scope="module")
def uninterrupted(crops, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(crops, out, *RUN))
    return out


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, EXIT_INTERRUPTED)]
)
def test_resumed_run_equals_uninterrupted_run(crops, uninterrupted, tmp_path, number, exit_code):
    out = tmp_path / "run"
    process = start(crops, out, *RUN)
    wait_for_step(process, out / "metrics.jsonl", 5)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == exit_code
    cut = read_checkpoint(out / "checkpoints/last.pth")["personvit"]["step"]
    assert 0 < cut < 24
    output = finish(start(crops, out, *RUN, "--resume", "auto"))
    assert f"at step {cut} of 24" in output
    whole = read_checkpoint(uninterrupted / "checkpoints/last.pth")
    continued = read_checkpoint(out / "checkpoints/last.pth")
    whole["args"].pop("data"), continued["args"].pop("data")
    assert_same(whole, continued)
    assert train_rows(uninterrupted / "metrics.jsonl") == train_rows(out / "metrics.jsonl")
