"""`personvit demo` from nothing to the table, at a size that takes seconds."""

from __future__ import annotations

import json

from omegaconf import OmegaConf
from tiny_runs import TINY, one_thread

from personvit.demo import main
from personvit.runtime.entry import run

SMALL = [
    *TINY,
    "data.generated_train=24",
    "data.generated_train_ids=6",
    "data.generated_test_ids=3",
    "health.probe_every_epochs=1",
    "train.max_steps=4",
    "train.batch_size=8",
]
SMALL_FINETUNING = [
    "train.epochs=1",
    "train.batch_size=4",
    "train.instances=2",
    "input.size=[32,16]",
    "data.num_workers=0",
]


def run_demo(out, capsys) -> str:
    assert run(main, ["--out", str(out), *SMALL, "--finetune", *SMALL_FINETUNING]) == 0
    return capsys.readouterr().out


def test_demo_tells_the_whole_story_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "demo"
    with one_thread():
        shown = run_demo(out, capsys)
        written = (out / "finetune-scratch-seed1" / "checkpoints" / "last.pth").stat().st_mtime_ns
        again = run_demo(out, capsys)  # finished already: evaluates what is there
    rows = json.loads((out / "demo.json").read_text())
    trained = [f"fine-tuned, {start}, seed {seed}" for start in ("pre-trained", "from scratch") for seed in (0, 1)]
    assert list(rows) == ["raw pixels", "random initialisation", "pre-trained", *trained]
    assert all(name in shown for name in rows)
    assert all(row.keys() == {"mAP", "rank-1", "rr-mAP", "rr-rank-1"} for row in rows.values())
    assert all(0 <= value <= 1 for row in rows.values() for value in row.values())
    assert len({tuple(row.values()) for row in rows.values()}) > 3  # not one model evaluated seven times
    assert "after 4 steps" in shown
    for picture in ("curves.png", "rank_lists.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert again.split("took")[0] == shown.split("took")[0]
    assert (out / "finetune-scratch-seed1" / "checkpoints" / "last.pth").stat().st_mtime_ns == written


def test_fine_tunings_start_from_what_their_name_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "demo"
    with one_thread():
        run_demo(out, capsys)
    given = {
        folder.name: OmegaConf.load(folder / "resolved.yaml")
        for folder in sorted(out.iterdir())
        if folder.is_dir()
        if folder.name.startswith("finetune-")
    }
    backbone = str(out / "exported" / "backbone.safetensors")
    assert {name: (cfg.model.weights, cfg.train.seed) for name, cfg in given.items()} == {
        "finetune-pretrained-seed0": (backbone, 0),
        "finetune-pretrained-seed1": (backbone, 1),
        "finetune-scratch-seed0": (None, 0),
        "finetune-scratch-seed1": (None, 1),
    }
