from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch

from personvit.engine.checkpoint import check_fit, keep_snapshot, read_checkpoint, write_checkpoint
from personvit.errors import CheckpointError

STATE = {"teacher": {"w": torch.arange(6.0)}, "epoch": 3, "args": {"a": [1, 2.5, "x", None]}, "personvit": {"step": 7}}


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoints/last.pth"
    write_checkpoint(path, STATE)
    state = read_checkpoint(path)
    assert torch.equal(state.pop("teacher")["w"], STATE["teacher"]["w"])
    assert state == {"epoch": 3, "args": {"a": [1, 2.5, "x", None]}, "personvit": {"step": 7}}
    assert [entry.name for entry in path.parent.iterdir()] == ["last.pth"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_full_disk_leaves_the_previous_checkpoint_whole(tmp_path):
    path = tmp_path / "last.pth"
    write_checkpoint(path, STATE)
    before = path.read_bytes()
    # The file that is written first is replaced by a link to a full device: a real ENOSPC from the system.
    (tmp_path / ".last.pth.part").symlink_to("/dev/full")
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(path, {**STATE, "teacher": {"w": torch.zeros(500_000)}})
    message = str(caught.value)
    assert "No space left on device" in message
    assert str(path) in message
    assert "--resume auto" in message
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pth"]


def test_crash_while_writing_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    write_checkpoint(path, STATE)

    def crash(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, STATE)
    assert read_checkpoint(path)["epoch"] == 3


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        write_checkpoint(tmp_path / "file" / "last.pth", STATE)


def test_snapshot_outlives_later_writes(tmp_path):
    last, snapshot = tmp_path / "last.pth", tmp_path / "checkpoint0020.pth"
    write_checkpoint(last, STATE)
    keep_snapshot(last, snapshot)
    write_checkpoint(last, {**STATE, "epoch": 4})
    assert read_checkpoint(snapshot)["epoch"] == 3
    assert read_checkpoint(last)["epoch"] == 4


def test_snapshot_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    last, snapshot = tmp_path / "last.pth", tmp_path / "checkpoint0020.pth"
    write_checkpoint(last, STATE)
    keep_snapshot(last, snapshot)
    assert read_checkpoint(snapshot)["epoch"] == 3


class _Malicious:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("content", [_Malicious(), argparse.Namespace(lr=1.0)])
def test_foreign_pickle_is_refused_and_not_executed(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save({**STATE, "args": content}, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match="refused, because loading them could run code"):
        read_checkpoint(tmp_path / "last.pth")
    assert not (tmp_path / "executed").exists()


def test_damaged_missing_and_other_files(tmp_path):
    path = tmp_path / "last.pth"
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(path)
    write_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)
    path.write_text("lr: 1\n")
    with pytest.raises(CheckpointError, match=r"refused|damaged"):
        read_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=r"model\.weights="):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="found: list"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("found", "difference"),
    [
        ({"a": torch.zeros(2), "b": torch.zeros(3, 4)}, None),
        ({"a": torch.zeros(2)}, "b is missing in it"),
        ({"a": torch.zeros(2), "b": torch.zeros(3, 5)}, "b is [3, 5] in it and [3, 4] as configured"),
        ({"a": torch.zeros(2), "b": torch.zeros(3, 4), "c": torch.zeros(1)}, "c is in it and not in the configured"),
    ],
)
def test_check_fit_names_the_first_difference(found, difference):
    wanted = {"a": torch.zeros(2), "b": torch.zeros(3, 4)}
    if difference is None:
        check_fit(found, wanted, "teacher", "x.pth")
        return
    with pytest.raises(CheckpointError) as caught:
        check_fit(found, wanted, "teacher", "x.pth")
    assert f"teacher {difference}" in str(caught.value)
    assert "--out DIR" in str(caught.value)
