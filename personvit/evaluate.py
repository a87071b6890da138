"""`personvit evaluate`: mAP, rank-k and mINP of a backbone on a labelled set."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from personvit import __version__, ops
from personvit.config import IMAGENET_MEAN, IMAGENET_STD, EvaluateConfig, load_config, to_plain, to_yaml
from personvit.data.loaders import reader_count
from personvit.data.reid_sets import ReIDSet, open_reid_set
from personvit.embedder import load
from personvit.errors import DataError
from personvit.models.vit import build_vit
from personvit.retrieval import RankingResult, evaluate_backbone
from personvit.retrieval.features import Backbone, RawPixels
from personvit.runtime.entry import run

logger = logging.getLogger("personvit.evaluate")  # __name__ is "__main__" under python -m

_RAW_SIZE = (64, 32)
_RANDOM_SIZE = (256, 128)
_RANKS = (1, 5, 10)


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and the input that it expects."""

    model: Backbone
    description: str
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    subject: Subject
    reid_set: ReIDSet
    generated: bool
    result: RankingResult

    def text(self) -> str:
        """The figures in percent, as a table, and what they are figures of."""
        values = {
            "mAP": self.result.mAP,
            **{f"R{k}": self.result.rank(k) for k in _RANKS},
            "mINP": self.result.mINP,
        }
        lines = [
            "".join(f"{name:>8}" for name in values),
            "".join(f"{100 * value:8.2f}" for value in values.values()),
            f"percent, over {self.result.valid.sum()} of {len(self.result.valid)} queries with a match in another "
            f"camera; {self.subject.description}",
        ]
        if self.generated:
            lines.append("Generated persons: fit for comparing models with each other, no statement on real cameras.")
        return "\n".join(lines)

    def summary(self, cfg: EvaluateConfig) -> dict[str, Any]:
        """Everything worth keeping, as plain values; shares in [0, 1]."""
        return {
            "mAP": self.result.mAP,
            **{f"rank{k}": self.result.rank(k) for k in _RANKS},
            "mINP": self.result.mINP,
            "cmc": [float(value) for value in self.result.cmc],
            "queries": len(self.result.valid),
            "valid_queries": int(self.result.valid.sum()),
            "gallery": len(self.reid_set.gallery),
            "data": self.reid_set.name,
            "root": self.reid_set.root,
            "generated": self.generated,
            "model": self.subject.description,
            "image_size": list(self.subject.image_size),
            "config": to_plain(cfg),
            "personvit_version": __version__,
        }


def open_data(cfg: EvaluateConfig) -> tuple[ReIDSet, bool]:
    """The labelled set that the configuration names, and whether it is the generated one.

    Raises:
        DataError: no such set, or not of that layout.
    """
    if cfg.data.root is not None:
        return open_reid_set(cfg.data.name, cfg.data.root), cfg.data.name == "generated"
    if cfg.data.name not in ("auto", "generated"):
        raise DataError(f"data.name={cfg.data.name} needs data.root=FOLDER, the folder that holds the set.")
    from personvit.data.generated.dataset import ensure_generated  # needs the renderer: not for those with images

    logger.info("no data.root given: evaluating on generated persons")
    return open_reid_set("generated", ensure_generated(cfg.data)), True


def build_subject(cfg: EvaluateConfig) -> Subject:
    """The model to evaluate: weights, else (for comparison) raw pixels or a random initialisation.

    Raises:
        CheckpointError: weights that cannot be used.
        ConfigError: unknown architecture, or an image size that its patches do not divide.
    """
    if cfg.raw_pixels:
        size = cfg.image_size or _RAW_SIZE
        text = f"baseline without a model: raw pixels at {size[0]}x{size[1]}"
        return Subject(RawPixels(), text, size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    if cfg.model.weights is None:
        size = cfg.image_size or _RANDOM_SIZE
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the baseline should be the same one each time
            backbone = build_vit(cfg.model.arch, img_size=size, patch_size=cfg.model.patch_size).eval()
        if torch.cuda.is_available():
            backbone.cuda()
        text = f"baseline without training: {cfg.model.arch} at {size[0]}x{size[1]}, random initialisation"
        return Subject(backbone, text, size, IMAGENET_MEAN, IMAGENET_STD)
    model = load(cfg.model.weights, image_size=cfg.image_size)
    text = f"{model.info.arch} at {model.image_size[0]}x{model.image_size[1]} from {cfg.model.weights}"
    return Subject(model.backbone, text, model.image_size, model.mean, model.std)


def evaluate(cfg: EvaluateConfig) -> Evaluation:
    """Evaluate as configured.

    Raises:
        PersonViTError: data or weights that cannot be used, with what to do.
    """
    ops.set_backend(cfg.kernels.backend)
    subject = build_subject(cfg)
    reid_set, generated = open_data(cfg)
    logger.info("%s\nmodel: %s", reid_set.table(), subject.description)
    result = evaluate_backbone(
        subject.model,
        reid_set,
        subject.image_size,
        subject.mean,
        subject.std,
        cfg.batch_size,
        max_rank=cfg.max_rank,
        flip=cfg.flip,
        num_workers=reader_count(cfg.data.num_workers),
    )
    return Evaluation(subject, reid_set, generated, result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="personvit evaluate",
        description="Retrieval quality of a backbone on a labelled person ReID set (no data.root: generated persons).",
        epilog="examples:\n"
        "  personvit evaluate data.name=market1501 data.root=Market-1501 model.weights=backbone.safetensors\n"
        "  personvit evaluate raw_pixels=true                       baseline: no model\n"
        "  personvit evaluate model.arch=vit_small                  baseline: random initialisation\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the keys below")
    parser.add_argument("--fused", action="store_true", help="fastest operators here; same as kernels.backend=fused")
    parser.add_argument("--out", metavar="FILE", help="also write the figures there, as JSON")
    parser.add_argument("--print-config", action="store_true", help="print every key with its value, and leave")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values, e.g. batch_size=256")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate and print; returns 0.

    Args:
        argv: arguments without the program name; None: those of this process.
    """
    arguments = _parser().parse_intermixed_args(argv)
    overrides = [*(["kernels.backend=fused"] if arguments.fused else []), *arguments.overrides]
    cfg = load_config(EvaluateConfig, arguments.config, overrides)
    if arguments.print_config:
        sys.stdout.write(to_yaml(cfg))
        return 0
    if arguments.out:
        _write(Path(arguments.out), "")  # better now than after the work
    evaluation = evaluate(cfg)
    sys.stdout.write(evaluation.text() + "\n")
    if arguments.out:
        _write(Path(arguments.out), json.dumps(evaluation.summary(cfg), indent=2) + "\n")
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"--out {path} cannot be written: {error.strerror}. Name another file.") from None


if __name__ == "__main__":
    raise SystemExit(run(main))
