"""`personvit evaluate`: mAP, rank-k and mINP of a backbone or a fine-tuned model on a labelled set."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path

import torch

from personvit import ops
from personvit.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PROTOCOLS,
    EvaluateConfig,
    load_config,
    to_yaml,
)
from personvit.data.reid_sets import ReIDSet, data_of_each_set, open_reid_set
from personvit.engine.evaluation import Evaluation, Subject, evaluate_set, report_text
from personvit.errors import DataError
from personvit.models.reid import ReIDModel
from personvit.models.vit import build_vit
from personvit.models.weights import load_network
from personvit.retrieval.features import RawPixels
from personvit.retrieval.report import queries_as_csv, queries_as_json, query_rows
from personvit.runtime.entry import run
from personvit.visualization.rank_lists import plot_rank_lists

logger = logging.getLogger("personvit.evaluate")  # __name__ is "__main__" under python -m

_RAW_SIZE = (64, 32)
_RANDOM_SIZE = (256, 128)


def open_data(cfg: EvaluateConfig) -> tuple[ReIDSet, bool]:
    """The labelled set that the configuration names, and whether it is the generated one.

    Raises:
        DataError: no such set, or not of that layout.
    """
    keep = cfg.protocol == "keep"
    if cfg.data.root is not None:
        reid_set = open_reid_set(cfg.data.name, cfg.data.root, keep_same_camera=keep)
        return reid_set, cfg.data.name == "generated"
    if cfg.data.name not in ("auto", "generated"):
        raise DataError(f"data.name={cfg.data.name} needs data.root=FOLDER, the folder that holds the set.")
    from personvit.data.generated.dataset import ensure_generated  # needs the renderer: not for those with images

    logger.info("no data.root given: evaluating on generated persons")
    return open_reid_set("generated", ensure_generated(cfg.data), keep_same_camera=keep), True


def build_subject(cfg: EvaluateConfig) -> Subject:
    """The model to evaluate: weights, else (for comparison) raw pixels or a random initialisation.

    Raises:
        CheckpointError: weights that cannot be used.
        ConfigError: unknown architecture, or an image size that its patches do not divide.
    """
    if cfg.raw_pixels:
        size = cfg.image_size or _RAW_SIZE
        text = f"baseline without a model: raw pixels at {size[0]}x{size[1]}"
        return Subject(RawPixels(), text, size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), kind="raw pixels")
    if cfg.model.weights is None:
        size = cfg.image_size or _RANDOM_SIZE
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the baseline should be the same one each time
            backbone = build_vit(cfg.model.arch, img_size=size, patch_size=cfg.model.patch_size).eval()
        if torch.cuda.is_available():
            backbone.cuda()
        text = f"baseline without training: {cfg.model.arch} at {size[0]}x{size[1]}, random initialisation"
        return Subject(backbone, text, size, IMAGENET_MEAN, IMAGENET_STD, cfg.model.arch)
    model, info = load_network(cfg.model.weights, cfg.image_size)
    if torch.cuda.is_available():
        model.cuda()
    text = f"{info.arch} at {info.image_size[0]}x{info.image_size[1]} from {cfg.model.weights}"
    kind = info.arch
    if isinstance(model, ReIDModel):
        text += f", feature {model.neck_feat} the neck"
        kind += f", {model.neck_feat} the neck"
    return Subject(model, text, info.image_size, info.mean, info.std, kind)


def evaluate(cfg: EvaluateConfig) -> Evaluation:
    """Evaluate on one set, as configured.

    Raises:
        PersonViTError: data or weights that cannot be used, with what to do.
    """
    ops.set_backend(cfg.kernels.backend)
    return _evaluate(cfg, build_subject(cfg))


def evaluate_each(cfg: EvaluateConfig) -> list[Evaluation]:
    """Evaluate the same model on every set that `data.name` lists.

    Raises:
        PersonViTError: data or weights that cannot be used, with what to do.
    """
    parts = [dataclasses.replace(cfg, data=data) for data in data_of_each_set(cfg.data)]
    ops.set_backend(cfg.kernels.backend)
    for part in parts[1:]:
        open_data(part)  # a wrong folder should be known before hours of work on the first set
    subject = build_subject(cfg)
    return [_evaluate(part, subject) for part in parts]


def _evaluate(cfg: EvaluateConfig, subject: Subject) -> Evaluation:
    reid_set, generated = open_data(cfg)
    logger.info("%s\nmodel: %s", reid_set.table(), subject.description)
    return evaluate_set(cfg, subject, reid_set, generated=generated)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="personvit evaluate",
        description="Retrieval quality of a backbone or a fine-tuned model on a labelled person ReID set (no "
        "data.root: generated persons).",
        epilog="examples:\n"
        "  personvit evaluate data.name=market1501 data.root=Market-1501 model.weights=backbone.safetensors\n"
        "  personvit evaluate ... --rerank rerank.preset=personvit  also re-ranked: 50/15/0.3 instead of 20/6/0.3\n"
        "  personvit evaluate data.name=msmt17,market1501 data.root=FOLDER_ABOVE ...   the same weights on each set\n"
        "  personvit evaluate ... expansion.top=5 cache=features    query expansion; features kept for the next time\n"
        "  personvit evaluate raw_pixels=true                       baseline: no model\n"
        "  personvit evaluate model.arch=vit_small                  baseline: random initialisation\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the keys below")
    parser.add_argument("--fused", action="store_true", help="fastest operators here; same as kernels.backend=fused")
    parser.add_argument("--rerank", action="store_true", help="also re-rank; same as rerank.enabled=true")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="gallery images of a query's identity and camera: left out (market, the default), or matches (keep)",
    )
    parser.add_argument("--out", metavar="FILE", help="also write the figures there, as JSON")
    parser.add_argument("--per-query", metavar="FILE", help="also write the result of every query, .json or .csv")
    parser.add_argument("--rank-lists", metavar="FILE.png", help="also draw some queries with what was found for them")
    parser.add_argument("--print-config", action="store_true", help="print every key with its value, and leave")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values, e.g. batch_size=256")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate and print; returns 0.

    Args:
        argv: arguments without the program name; None: those of this process.
    """
    arguments = _parser().parse_intermixed_args(argv)
    flags = {
        "kernels.backend": "fused" if arguments.fused else None,
        "rerank.enabled": "true" if arguments.rerank else None,
        "protocol": arguments.protocol,
        "out": arguments.out,
        "per_query": arguments.per_query,
        "rank_lists": arguments.rank_lists,
    }
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    cfg = load_config(EvaluateConfig, arguments.config, [*given, *arguments.overrides])
    if arguments.print_config:
        sys.stdout.write(to_yaml(cfg))
        return 0
    for file in (cfg.out, cfg.per_query, cfg.rank_lists):
        if file is not None:
            _write(Path(file), None)  # better now than after the work
    evaluations = evaluate_each(cfg)
    sys.stdout.write(report_text(evaluations) + "\n")
    if cfg.out is not None:
        summaries = [one.summary() for one in evaluations]
        _write(Path(cfg.out), json.dumps(summaries if len(summaries) > 1 else summaries[0], indent=2) + "\n")
    if cfg.per_query is not None:
        rows = [row for one in evaluations for row in query_rows(one.reid_set, one.plain, one.reranked)]
        as_text = queries_as_csv if Path(cfg.per_query).suffix.lower() == ".csv" else queries_as_json
        _write(Path(cfg.per_query), as_text(rows))
    if cfg.rank_lists is not None:
        _draw(Path(cfg.rank_lists), evaluations)
    return 0


def _draw(path: Path, evaluations: list[Evaluation]) -> None:
    """A picture for each set; with several sets their names are added to that of the file."""
    for one in evaluations:
        file = path if len(evaluations) == 1 else path.with_stem(f"{path.stem}-{one.reid_set.name}")
        plot_rank_lists(one.reid_set, one.plain, file, reranked=one.reranked)


def _write(path: Path, text: str | None) -> None:
    """Replace a file's content; None only makes sure that it can be written, and keeps what an earlier run left."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if text is None else "w", encoding="utf-8") as file:
            file.write(text or "")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}. Name another file.") from None


if __name__ == "__main__":
    raise SystemExit(run(main))
