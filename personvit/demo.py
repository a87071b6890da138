"""`personvit demo`: draw persons, pre-train, fine-tune, and say what the features are worth on persons never seen."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from personvit.config import EvaluateConfig, FinetuneConfig, PretrainConfig, RerankConfig, load_config
from personvit.data.generated.dataset import ensure_generated
from personvit.data.sources import FolderSource
from personvit.engine.evaluation import Evaluation
from personvit.engine.health import view_retrieval
from personvit.errors import EXIT_INTERRUPTED
from personvit.evaluate import evaluate
from personvit.finetune import finetune
from personvit.pretrain import pretrain
from personvit.runtime.entry import run
from personvit.runtime.progress import format_duration
from personvit.visualization.curves import plot_run
from personvit.visualization.rank_lists import plot_rank_lists

logger = logging.getLogger("personvit.demo")  # `python -m` names this module __main__

SEEDS = (0, 1)
_SHORTER = ["train.epochs=20"]  # four fine-tunings in the time of three
_VIEWS, _DRAWS = 256, 4
_PRETRAINED, _SCRATCH = "fine-tuned, pre-trained", "fine-tuned, from scratch"

_WHAT_IT_SHOWS = """\
mAP, rank-1: find {valid} queries of persons that no model has seen, in a gallery of other cameras. rr-: after
k-reciprocal re-ranking (k1=20, k2=6, lambda=0.3), which also uses who is near whom. Fine-tuning: {epochs} epochs on
{ids} other persons with names, once for each seed; "pre-trained" starts from the backbone of this run, "from scratch"
from random weights. Pre-training, without names: of {views} augmented images, the other view of the same one is found
for {before:.1f} % before and {after:.1f} % after it (guessing: {chance:.1f} %).
What this shows: every part works on this machine. What it cannot show: how good PersonViT is. This is a {arch} at
{height}x{width} after {steps} steps on drawn persons; the paper pre-trains a ViT-S or ViT-B at 256x128 for 300 epochs
on 4 million crops. So few steps of self-distillation can make a worse start than none (docs/learning.md).\
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="personvit demo",
        description="Draw persons, pre-train and fine-tune on them, evaluate on others. Minutes on a laptop.",
        epilog="An interrupted demo goes on where it stopped. Overrides are those of personvit pretrain.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="run folder (default %(default)s)")
    parser.add_argument("--fused", action="store_true", help="fastest operators here; same as kernels.backend=fused")
    parser.add_argument(
        "--finetune",
        nargs="+",
        default=[],
        metavar="key=value",
        help="values for personvit finetune, e.g. train.epochs=5",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values, e.g. train.epochs=20")
    return parser


class Demo:
    """The parts of a demo; each goes on where an earlier one was interrupted.

    Args:
        cfg: of the pre-training.
        finetuning: of the fine-tuning; its data, backend and seed are set here.
        out: run folder of the pre-training; those of the fine-tunings lie below it.
    """

    def __init__(self, cfg: PretrainConfig, finetuning: FinetuneConfig, out: Path) -> None:
        self.cfg, self.out = cfg, out
        self.root = ensure_generated(cfg.data)
        root = str(self.root)
        self.cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, name="generated", root=root))
        self.finetuning = dataclasses.replace(
            finetuning,
            data=dataclasses.replace(finetuning.data, name="generated", root=root),
            kernels=cfg.kernels,
        )
        self.rows: dict[str, dict[str, float]] = {}

    def evaluate(self, name: str, weights: Path | None = None, *, raw_pixels: bool = False) -> Evaluation:
        """Evaluate a model on the query and gallery, with and without re-ranking, as a row of the table."""
        found = evaluate(
            EvaluateConfig(
                data=self.cfg.data,
                model=dataclasses.replace(self.cfg.model, weights=None if weights is None else str(weights)),
                kernels=self.cfg.kernels,
                rerank=RerankConfig(enabled=True),
                image_size=self.cfg.crops.global_size,
                raw_pixels=raw_pixels,
                rank_lists=str(self.out / "rank_lists.png"),
            )
        )
        assert found.reranked is not None  # asked for
        self.rows[name] = {
            "mAP": found.result.mAP,
            "rank-1": found.result.rank(1),
            "rr-mAP": found.reranked.result.mAP,
            "rr-rank-1": found.reranked.result.rank(1),
        }
        return found

    def other_view(self, evaluation: Evaluation) -> float:
        """Share of persons never seen whose other augmented view is found."""
        persons = FolderSource(self.root / "query")
        draws = [
            view_retrieval(evaluation.subject.model, persons, self.cfg.crops, min(_VIEWS, len(persons)), seed)
            for seed in range(_DRAWS)
        ]
        return sum(draws) / len(draws)

    def finetune(self, weights: Path | None, seed: int) -> Path | None:
        """Fine-tune and return the exported model; None if a signal stopped it."""
        cfg = dataclasses.replace(
            self.finetuning,
            model=dataclasses.replace(self.finetuning.model, weights=None if weights is None else str(weights)),
            train=dataclasses.replace(self.finetuning.train, seed=seed),
        )
        folder = self.out / f"finetune-{'scratch' if weights is None else 'pretrained'}-seed{seed}"
        result = finetune(cfg, folder, resume="auto")
        return None if result.interrupted else result.model


def _table(rows: dict[str, dict[str, float]]) -> str:
    columns = next(iter(rows.values()))
    lines = [f"{'percent':<34}" + "".join(f"{name:>11}" for name in columns)]
    lines += [f"{name:<34}" + "".join(f"{100 * value:11.2f}" for value in row.values()) for name, row in rows.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: arguments without the program name; None: those of this process.

    Returns:
        0, or `EXIT_INTERRUPTED` when a signal stopped a training after it was saved.
    """
    arguments = _parser().parse_intermixed_args(argv)
    fused = ["kernels.backend=fused"] if arguments.fused else []
    cfg = load_config(PretrainConfig, "demo", [*fused, *arguments.overrides])
    finetuning = load_config(FinetuneConfig, "finetune_demo", [*_SHORTER, *arguments.finetune])
    out = Path(arguments.out)
    begin = time.perf_counter()

    logger.info("1/5 generated persons")
    demo = Demo(cfg, finetuning, out)
    logger.info("a look at them: %s", demo.root / "contact_sheet.png")

    logger.info("2/5 what retrieval is worth without training")
    demo.evaluate("raw pixels", raw_pixels=True)
    before = demo.other_view(demo.evaluate("random initialisation"))

    logger.info("3/5 pre-training without labels, into %s", out)
    pretrained = pretrain(demo.cfg, out, resume="auto")
    if pretrained.interrupted:
        return EXIT_INTERRUPTED
    after = demo.other_view(demo.evaluate("pre-trained", pretrained.backbone))

    logger.info("4/5 fine-tuning with labels, from the pre-trained backbone and from random weights")
    shown = None
    for name, weights in ((_PRETRAINED, pretrained.backbone), (_SCRATCH, None)):
        for seed in SEEDS:
            model = demo.finetune(weights, seed)
            if model is None:
                return EXIT_INTERRUPTED
            found = demo.evaluate(f"{name}, seed {seed}", model)
            shown = shown or found

    logger.info("5/5 table and pictures")
    assert shown is not None
    picture = plot_rank_lists(shown.reid_set, shown.plain, out / "rank_lists.png", reranked=shown.reranked)
    curves = plot_run(out, out / "curves.png")
    (out / "demo.json").write_text(json.dumps(demo.rows, indent=2) + "\n", encoding="utf-8")
    notes = _notes(demo, shown, before, after, pretrained.step)
    sys.stdout.write(
        f"\n{_table(demo.rows)}\n\n{notes}\n\n"
        f"who was found      {picture}\n"
        f"losses and health  {curves}\n"
        f"the persons        {demo.root / 'contact_sheet.png'}\n"
        f"the backbone       {pretrained.backbone}\n"
        f"took               {format_duration(time.perf_counter() - begin)}\n\n"
        f"Next, on your own crops: python -m personvit.pretrain --fused data.root=FOLDER --out runs/mine\n"
    )
    return 0


def _notes(demo: Demo, evaluation: Evaluation, before: float, after: float, steps: int) -> str:
    height, width = demo.cfg.crops.global_size
    views = min(_VIEWS, len(evaluation.reid_set.query))
    values: dict[str, Any] = {
        "valid": evaluation.result.valid.sum(),
        "epochs": demo.finetuning.train.epochs,
        "ids": len(evaluation.reid_set.train_pids),
        "views": views,
        "before": 100 * before,
        "after": 100 * after,
        "chance": 100 / views,
        "arch": demo.cfg.model.arch,
        "height": height,
        "width": width,
        "steps": steps,
    }
    return _WHAT_IT_SHOWS.format(**values)


if __name__ == "__main__":
    raise SystemExit(run(main))
