"""`personvit demo` from nothing to the table, at a size that takes seconds."""

from __future__ import annotations

import json

from tiny_runs import TINY, one_thread

from personvit.demo import main
from personvit.runtime.entry import run

SMALL = [
    *TINY,
    "data.generated_train=24",
    "data.generated_test_ids=3",
    "health.probe_every_epochs=1",
    "train.max_steps=4",
    "train.batch_size=8",
]


def test_demo_prints_table_and_draws_curves(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "demo"
    with one_thread():
        assert run(main, ["--out", str(out), *SMALL]) == 0
        shown = capsys.readouterr().out
        again = run(main, ["--out", str(out), *SMALL])  # finished already: evaluates what is there
    assert again == 0
    for name in ("raw pixels", "random initialisation", "pre-trained, this run"):
        assert name in shown
    assert "after 4 steps" in shown
    rows = json.loads((out / "demo.json").read_text())
    assert rows["raw pixels"].keys() == {"mAP", "rank-1", "rank-5", "rr-mAP", "other view"}
    assert all(0 <= value <= 1 for row in rows.values() for value in row.values())
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.split("losses and health")[0] == shown.split("losses and health")[0]
