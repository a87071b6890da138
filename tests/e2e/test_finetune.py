"""`personvit finetune` from the command line: after a pre-training, interrupted, on two ranks, and evaluated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from tiny_finetune import arguments, start, write_persons
from tiny_runs import ROOT, assert_same, finish, one_thread, train_rows, wait_for_step

from personvit.engine.checkpoint import read_checkpoint
from personvit.errors import EXIT_INTERRUPTED
from personvit.evaluate import main as evaluate_main
from personvit.finetune import main as finetune_main
from personvit.pretrain import main as pretrain_main
from personvit.runtime.entry import run
from personvit.runtime.runlog import read_metrics

FIGURES = ("mAP", "rank1", "rank5", "rank10", "mINP", "cmc")


@pytest.fixture(scope="module")
def persons(tmp_path_factory) -> Path:
    return write_persons(tmp_path_factory.mktemp("data") / "persons")


def evaluate(persons: Path, weights: Path, out: Path, *extra: str) -> dict:
    given = ["data.name=market1501", f"data.root={persons}", f"model.weights={weights}", "data.num_workers=0"]
    assert run(evaluate_main, [*given, "batch_size=16", "--out", str(out), *extra]) == 0
    return json.loads(out.read_text())


def test_pretrain_finetune_evaluate(persons, tmp_path, capsys):
    ssl, out = tmp_path / "ssl", tmp_path / "reid"
    crops = tiny_runs.arguments(persons / "bounding_box_train", ssl, "train.max_steps=2")
    assert run(pretrain_main, crops) == 0
    output = finish(start(persons, out, f"model.weights={ssl / 'exported/backbone.safetensors'}"))
    assert "architecture  vit_micro" in output
    assert "epoch 3 on market1501: mAP" in output
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith("tensorboard/events")} == {
        "config.yaml",
        "resolved.yaml",
        "metrics.jsonl",
        "train.log",
        "evaluation.json",
        "checkpoints/last.pth",
        "checkpoints/best.pth",
        "exported/model.safetensors",
        "exported/best.safetensors",
    }
    (reported,) = json.loads((out / "evaluation.json").read_text())["evaluations"]
    rerank = ["--rerank", "rerank.k1=4", "rerank.k2=2"]
    for weights in (out / "exported/model.safetensors", out / "checkpoints/last.pth"):
        figures = evaluate(persons, weights, tmp_path / f"{weights.name}.json", *rerank)
        assert {key: figures[key] for key in FIGURES} == {key: reported[key] for key in FIGURES}
        assert figures["rerank"] == reported["rerank"]
    printed = capsys.readouterr().out
    assert "vit_micro at 32x16" in printed
    assert "feature before the neck" in printed
    assert evaluate(persons, weights, tmp_path / "plain.json")["rerank"] is None


def test_evaluation_takes_neck_and_cameras_from_the_file(persons, tmp_path):
    extra = ["model.camera_embed=true", "model.neck_feat=after", "train.epochs=2"]
    assert run(finetune_main, arguments(persons, tmp_path / "run", *extra)) == 0
    (reported,) = json.loads((tmp_path / "run/evaluation.json").read_text())["evaluations"]
    for name in ("exported/model.safetensors", "checkpoints/last.pth"):
        figures = evaluate(persons, tmp_path / "run" / name, tmp_path / "figures.json")
        assert {key: figures[key] for key in FIGURES} == {key: reported[key] for key in FIGURES}
        assert "after the neck" in figures["model"]


LONG = ["train.epochs=16", "eval.every_epochs=2"]


@pytest.fixture(scope="module")
def uninterrupted(persons, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    with one_thread():
        assert run(finetune_main, arguments(persons, out, *LONG)) == 0
    return out


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, EXIT_INTERRUPTED)]
)
def test_resumed_run_equals_uninterrupted_run(persons, uninterrupted, tmp_path, number, exit_code):
    out = tmp_path / "run"
    process = start(persons, out, *LONG)
    wait_for_step(process, out / "metrics.jsonl", 6)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == exit_code
    cut = read_checkpoint(out / "checkpoints/last.pth")
    assert cut["personvit"]["step"] > 0
    assert cut["epoch"] < 16
    assert "continuing from" in finish(start(persons, out, *LONG, "--resume", "auto"))
    for name in ("last", "best"):
        assert_same(*(read_checkpoint(folder / f"checkpoints/{name}.pth") for folder in (uninterrupted, out)))
    assert train_rows(uninterrupted / "metrics.jsonl") == train_rows(out / "metrics.jsonl")


_RANK = """
import json, sys
from pathlib import Path
import torch
from tiny_finetune import tiny_config
from personvit.engine.finetune_loop import FinetuneRun
from personvit.runtime.distributed import init_distributed, shutdown
from personvit.runtime.runlog import FinetuneFolder

root, out = sys.argv[1:3]
ranks = init_distributed()
run = FinetuneRun(tiny_config(Path(root), *sys.argv[3:]), FinetuneFolder(out), ranks, "auto")
(one,) = run.run().evaluations
state = run.trainer.model.state_dict()
content = {"mAP": one.result.mAP, "cmc": one.result.cmc.tolist(), "reranked": one.reranked is not None}
content["weights"] = {name: value.double().sum().item() for name, value in state.items()}
Path(f"{out}.rank{ranks.rank}.json").write_text(json.dumps(content))
shutdown()
"""


def test_two_ranks_evaluate_the_same_model_to_the_same_figures(persons, tmp_path):
    out = tmp_path / "run"
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    output = finish(start(persons, out, "train.max_steps=2", launcher=(*torchrun, "-m")))
    assert output.count("done: 2 steps") == 1  # rank 1 keeps quiet
    assert "batch 8 = 2 rank(s) x 2 identities x 2 images" in output
    (tmp_path / "rank.py").write_text(_RANK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    command = [sys.executable, "-m", *torchrun, str(tmp_path / "rank.py"), str(persons), str(out), "train.epochs=2"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"run.rank{rank}.json").read_text()) for rank in (0, 1))
    assert (first.pop("reranked"), second.pop("reranked")) == (True, False)
    assert first == second
    saved = read_checkpoint(out / "checkpoints/last.pth")
    assert (saved["epoch"], saved["personvit"]["world_size"]) == (2, 2)
    rows = read_metrics(out / "metrics.jsonl", "train")
    assert [row["step"] for row in rows] == list(range(1, saved["personvit"]["step"] + 1))
    sums = {name: value.double().sum().item() for name, value in saved["state_dict"].items()}
    assert sums == first["weights"]
    # and one process alone finds the same
    assert evaluate(persons, out / "exported/model.safetensors", tmp_path / "alone.json")["mAP"] == first["mAP"]
