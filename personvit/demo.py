"""`personvit demo`: draw persons, pre-train on them, and say what the features are worth on persons never seen."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from personvit.config import EvaluateConfig, PretrainConfig, RerankConfig, load_config
from personvit.data.generated.dataset import ensure_generated
from personvit.data.sources import FolderSource
from personvit.engine.health import view_retrieval
from personvit.errors import EXIT_INTERRUPTED
from personvit.evaluate import Evaluation, evaluate
from personvit.pretrain import pretrain
from personvit.runtime.entry import run
from personvit.runtime.progress import format_duration
from personvit.visualization.curves import plot_run

logger = logging.getLogger("personvit.demo")  # `python -m` names this module __main__

_VIEWS, _DRAWS = 256, 4

_WHAT_IT_SHOWS = """\
mAP, rank-1, rank-5: find {valid} queries of persons that the model has never seen in a gallery of other cameras.
rr-mAP: the same after k-reciprocal re-ranking (k1=20, k2=6, lambda=0.3), which also uses who is near whom.
other view: of {views} augmented images of such persons, find the other view of the same image (guessing: {chance:.2f}).
What this shows: every part works on this machine, and what the model has learnt so far. Training saw no label.
What it cannot show: how good PersonViT is. This is a {arch} at {height}x{width} after {steps} steps on drawn persons;
the recipe of the paper is a ViT-S or ViT-B at 256x128 for 300 epochs on 4 million crops. Self-distillation needs
thousands of steps before it beats raw pixels across cameras.\
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="personvit demo",
        description="Draw persons, pre-train on them, compare with raw pixels and random weights. Minutes on a laptop.",
        epilog="An interrupted demo goes on where it stopped. Overrides are those of personvit pretrain.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="run folder (default %(default)s)")
    parser.add_argument("--fused", action="store_true", help="fastest operators here; same as kernels.backend=fused")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values, e.g. train.epochs=20")
    return parser


def _evaluate(cfg: PretrainConfig, root: Path, **changes: Any) -> Evaluation:
    """Evaluate on the query and gallery of the generated persons, at the size that the run trains at."""
    base = EvaluateConfig(
        data=dataclasses.replace(cfg.data, name="generated", root=str(root)),
        model=dataclasses.replace(cfg.model, weights=None),
        kernels=cfg.kernels,
        rerank=RerankConfig(enabled=True),
        image_size=cfg.crops.global_size,
    )
    return evaluate(dataclasses.replace(base, **changes))


def _numbers(cfg: PretrainConfig, root: Path, evaluation: Evaluation) -> dict[str, float]:
    """Shares in [0, 1]: retrieval across cameras, and finding an image's other augmented view; persons never seen."""
    result, reranked = evaluation.result, evaluation.reranked
    assert reranked is not None  # asked for in `_evaluate`
    persons = FolderSource(root / "query")
    draws = [
        view_retrieval(evaluation.subject.model, persons, cfg.crops, min(_VIEWS, len(persons)), seed)
        for seed in range(_DRAWS)
    ]
    return {
        "mAP": result.mAP,
        "rank-1": result.rank(1),
        "rank-5": result.rank(5),
        "rr-mAP": reranked.result.mAP,
        "other view": sum(draws) / len(draws),
    }


def _table(rows: dict[str, dict[str, float]]) -> str:
    columns = next(iter(rows.values()))
    lines = [f"{'percent':<24}" + "".join(f"{name:>12}" for name in columns)]
    lines += [f"{name:<24}" + "".join(f"{100 * value:12.2f}" for value in row.values()) for name, row in rows.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: arguments without the program name; None: those of this process.

    Returns:
        0, or `EXIT_INTERRUPTED` when a signal stopped the pre-training after it was saved.
    """
    arguments = _parser().parse_intermixed_args(argv)
    overrides = [*(["kernels.backend=fused"] if arguments.fused else []), *arguments.overrides]
    cfg = load_config(PretrainConfig, "demo", overrides)
    out = Path(arguments.out)
    begin = time.perf_counter()

    logger.info("1/4 generated persons")
    root = ensure_generated(cfg.data)
    logger.info("a look at them: %s", root / "contact_sheet.png")

    logger.info("2/4 what retrieval is worth without training")
    rows = {
        "raw pixels": _numbers(cfg, root, _evaluate(cfg, root, raw_pixels=True)),
        "random initialisation": _numbers(cfg, root, _evaluate(cfg, root)),
    }

    logger.info("3/4 pre-training without labels, into %s", out)
    data = dataclasses.replace(cfg.data, name="generated", root=str(root))
    result = pretrain(dataclasses.replace(cfg, data=data), out, resume="auto")
    if result.interrupted:
        return EXIT_INTERRUPTED

    logger.info("4/4 what retrieval is worth after it")
    weights = dataclasses.replace(cfg.model, weights=str(result.backbone))
    trained = _evaluate(cfg, root, model=weights, image_size=None)
    rows["pre-trained, this run"] = _numbers(cfg, root, trained)
    (out / "demo.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    picture = plot_run(out, out / "curves.png")

    height, width = cfg.crops.global_size
    views = min(_VIEWS, len(trained.reid_set.query))
    notes = _WHAT_IT_SHOWS.format(
        valid=trained.result.valid.sum(),
        views=views,
        chance=100 / views,
        arch=cfg.model.arch,
        height=height,
        width=width,
        steps=result.step,
    )
    sys.stdout.write(
        f"\n{_table(rows)}\n\n{notes}\n\n"
        f"losses and health  {picture}\n"
        f"the persons        {root / 'contact_sheet.png'}\n"
        f"the backbone       {result.backbone}\n"
        f"took               {format_duration(time.perf_counter() - begin)}\n\n"
        f"Next, on your own crops: python -m personvit.pretrain --fused data.root=FOLDER --out runs/mine\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
