from __future__ import annotations

import json
import math

import pytest

from personvit.errors import RunFolderError
from personvit.runtime.runlog import BadImages, MetricLog, RunFolder, read_metrics


def fill(folder: RunFolder) -> None:
    """What a run writes, and what it does not."""
    for name in ("checkpoints", "tensorboard", "exported", "non_finite"):
        (folder.root / name).mkdir(parents=True)
    ours = [folder.config, folder.resolved, folder.metrics, folder.log, folder.last, folder.snapshot(20)]
    ours += [folder.exported, folder.bad_images, folder.non_finite / "step0000003.pt"]
    ours += [folder.tensorboard / "events.out.tfevents.1.host", folder.last.with_name(".last.pth.part")]
    theirs = [folder.root / "notes.txt", folder.last.with_name("best.pth"), folder.root / "photos/a.jpg"]
    (folder.root / "photos").mkdir()
    for path in ours + theirs:
        path.write_text("x")


def test_new_folder_is_created(tmp_path):
    folder = RunFolder(tmp_path / "a/b")
    folder.prepare(resume=False, overwrite=False)
    assert folder.root.is_dir()
    folder.prepare(resume=False, overwrite=False)  # empty: free to use


def test_occupied_folder_names_both_remedies(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunFolderError) as caught:
        RunFolder(tmp_path).prepare(resume=False, overwrite=False)
    for words in (str(tmp_path), "--resume auto", "--overwrite", "--out DIR"):
        assert words in str(caught.value)


def test_resume_deletes_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    fill(folder)
    before = sorted(tmp_path.rglob("*"))
    folder.prepare(resume=True, overwrite=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite_deletes_what_runs_write_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path)
    fill(folder)
    folder.prepare(resume=False, overwrite=True)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["checkpoints", "checkpoints/best.pth", "notes.txt", "photos", "photos/a.jpg"]


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder(tmp_path / "file").prepare(resume=False, overwrite=True)
    with pytest.raises(RunFolderError, match="cannot write"):
        RunFolder(tmp_path / "file/below").prepare(resume=False, overwrite=False)


def test_rows_are_json_and_tensorboard(tmp_path):
    folder = RunFolder(tmp_path)
    log = MetricLog(folder)
    log.write(1, loss=1.5, skipped=0)
    log.write(2, "health", entropy=math.nan, usage=math.inf)
    log.close()
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert rows == [
        {"step": 1, "kind": "train", "loss": 1.5, "skipped": 0},
        {"step": 2, "kind": "health", "entropy": None, "usage": None},
    ]
    assert read_metrics(folder.metrics, "health") == rows[1:]
    assert list(folder.tensorboard.glob("events.out.tfevents.*"))


def test_resumed_log_drops_later_rows_and_a_torn_line(tmp_path):
    folder = RunFolder(tmp_path)
    log = MetricLog(folder)
    for step in range(1, 6):
        log.write(step, loss=float(step))
    log.close()
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    log = MetricLog(folder, resumed_step=3)
    log.write(4, loss=40.0)
    log.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(folder.metrics)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_log_of_a_run_that_starts_anew_is_empty(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 0, "kind": "probe"}\n{"step": 1, "kind": "train"}\n')
    MetricLog(folder).close()
    assert folder.metrics.read_text() == ""


def test_bad_images_are_listed_once(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    bad = BadImages(folder)
    bad.add([])
    assert not folder.bad_images.exists()
    bad.add(["a.jpg", "b.jpg", "a.jpg"])
    BadImages(folder).add(["b.jpg", "c.jpg"])
    assert folder.bad_images.read_text() == "a.jpg\nb.jpg\nc.jpg\n"
    assert "3 unreadable image(s)" in caplog.text
