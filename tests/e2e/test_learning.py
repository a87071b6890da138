"""Proof that the recipes learn, on two cores within 25 minutes. `make learn` runs it and shows the figures."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from personvit.config import FinetuneConfig, PretrainConfig, load_config
from personvit.data.sources import open_source
from personvit.engine.finetune_data import open_finetune_data
from personvit.engine.health import view_retrieval
from personvit.finetune import finetune
from personvit.models.ssl import StudentTeacher
from personvit.models.weights import load_model
from personvit.pretrain import pretrain
from personvit.runtime.entry import setup_logging
from personvit.runtime.runlog import read_metrics
from personvit.runtime.seed import seed_everything
from personvit.visualization.curves import plot_run

IMAGES = 128
"""Images of the question "which of these is the other view of this one?"; guessing scores 1 / IMAGES."""
DRAWS = 8
"""The question is asked about so many draws of views, and the answers averaged."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_pretraining_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """The other augmented view is found at least twice as often, the patch loss halves, health stays silent."""
    setup_logging()
    cfg = load_config(PretrainConfig, "learn")
    out = Path("runs/learn")
    source = open_source(cfg.data)

    def other_view(backbone) -> float:
        draws = [view_retrieval(backbone, source, cfg.crops, count=IMAGES, seed=seed) for seed in range(DRAWS)]
        return sum(draws) / DRAWS

    seed_everything(cfg.train.seed)  # what the run starts from
    before = other_view(StudentTeacher(cfg).teacher.backbone)
    begin = time.perf_counter()
    with capsys.disabled():
        result = pretrain(cfg, out, overwrite=True)
    seconds = time.perf_counter() - begin
    after = other_view(load_model(result.backbone))

    losses = [row["loss_patch"] for row in read_metrics(out / "metrics.jsonl", "train")]
    first, last = losses[0], sum(losses[-5:]) / len(losses[-5:])
    health = read_metrics(out / "metrics.jsonl", "health")
    warned = [line for line in (out / "train.log").read_text().splitlines() if "health at step" in line]
    picture = plot_run(out, out / "curves.png")
    with capsys.disabled():
        print(
            f"\nother view found among {IMAGES}: {before:.3f} at random initialisation, {after:.3f} after "
            f"{result.step} steps ({after / before:.1f}x)\n"
            f"masked-patch loss: {first:.3f} at the start, {last:.3f} at the end ({last / first:.2f}x)\n"
            f"effective rank of embeddings: {health[0]['effective_rank']:.1f} -> {health[-1]['effective_rank']:.1f}; "
            f"health warnings: {len(warned)}\n{seconds / 60:.1f} minutes; curves in {picture}"
        )
    assert after >= 2 * before, f"other view: {before:.3f} -> {after:.3f}"
    assert last <= first / 2, f"patch loss: {first:.3f} -> {last:.3f}"
    assert not warned, warned


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_finetuning_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """From random weights, in under 3 minutes of training: 60 mAP on persons never seen, and re-ranking improves it."""
    setup_logging()
    cfg = load_config(FinetuneConfig, "finetune_demo", ["eval.every_epochs=0"])
    out = Path("runs/learn-finetune")
    open_finetune_data(cfg)  # draws the persons, which is no training
    begin = time.perf_counter()
    with capsys.disabled():
        result = finetune(cfg, out, overwrite=True)
    seconds = time.perf_counter() - begin
    (found,) = result.evaluations
    assert found.reranked is not None
    plain, reranked = found.result, found.reranked.result
    with capsys.disabled():
        print(
            f"\nmAP {100 * plain.mAP:.1f}, rank-1 {100 * plain.rank(1):.1f}; re-ranked {100 * reranked.mAP:.1f}, "
            f"{100 * reranked.rank(1):.1f}; {result.step} steps and the evaluation took {seconds:.0f} s"
        )
    assert plain.mAP >= 0.6
    assert reranked.mAP > plain.mAP
    assert seconds < 180
