"""`personvit evaluate`: mAP, rank-k and mINP of a backbone on a labelled set."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from personvit import __version__, ops
from personvit.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PROTOCOLS,
    DataConfig,
    EvaluateConfig,
    load_config,
    to_plain,
    to_yaml,
)
from personvit.data.loaders import reader_count
from personvit.data.reid_sets import ReIDSet, ReIDSplit, open_reid_set
from personvit.embedder import load
from personvit.errors import ConfigError, DataError
from personvit.models.vit import build_vit
from personvit.retrieval.cache import FeatureCache, weights_digest
from personvit.retrieval.evaluation import Ranking, expanded_queries, rank_features
from personvit.retrieval.features import Backbone, FeatureSet, RawPixels, device_of, extract_features
from personvit.retrieval.metrics import RankingResult
from personvit.retrieval.report import (
    RERANKED,
    TOP,
    plain_figures,
    queries_as_csv,
    queries_as_json,
    query_rows,
    table,
)
from personvit.retrieval.rerank import RerankParameters
from personvit.runtime.entry import run

logger = logging.getLogger("personvit.evaluate")  # __name__ is "__main__" under python -m

_RAW_SIZE = (64, 32)
_RANDOM_SIZE = (256, 128)


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and the input that it expects."""

    model: Backbone
    description: str
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    kind: str
    """Architecture: with input size, normalisation and the values of the weights, all that decides a feature."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation on one set."""

    cfg: EvaluateConfig
    subject: Subject
    reid_set: ReIDSet
    generated: bool
    plain: Ranking
    reranked: Ranking | None = None

    @property
    def result(self) -> RankingResult:
        """The figures without re-ranking."""
        return self.plain.result

    def text(self) -> str:
        """The figures in percent, as a table, and what they are figures of."""
        return report_text([self])

    def summary(self) -> dict[str, Any]:
        """Everything worth keeping, as plain values; shares in [0, 1]."""
        return {
            **plain_figures(self.result),
            "rerank": self._reranked_summary(),
            "expansion": to_plain(self.cfg.expansion) if self.cfg.expansion.top else None,
            "protocol": self.cfg.protocol,
            "queries": len(self.result.valid),
            "valid_queries": int(self.result.valid.sum()),
            "gallery": len(self.reid_set.gallery),
            "data": self.reid_set.name,
            "root": self.reid_set.root,
            "generated": self.generated,
            "model": self.subject.description,
            "image_size": list(self.subject.image_size),
            "config": to_plain(self.cfg),
            "personvit_version": __version__,
        }

    def _reranked_summary(self) -> dict[str, Any] | None:
        if self.reranked is None:
            return None
        used = RerankParameters(*self.cfg.rerank.values())
        return {**dataclasses.asdict(used), "preset": used.preset, **plain_figures(self.reranked.result)}


def report_text(evaluations: Sequence[Evaluation]) -> str:
    """The figures of one model on one or more sets, and under which rules they were found."""
    cfg = evaluations[0].cfg
    rows = {one.reid_set.name: (one.result, one.reranked.result if one.reranked else None) for one in evaluations}
    lines = [table(rows)]
    for one in evaluations:
        where = f" of {one.reid_set.name}" if len(evaluations) > 1 else ""
        lines.append(
            f"percent, over {one.result.valid.sum()} of {len(one.result.valid)} queries{where} with a match"
            + (" in another camera" if cfg.protocol == "market" else "")
            + (f"; {one.subject.description}" if one is evaluations[-1] else "")
        )
    if cfg.rerank.enabled:
        lines.append(f"{RERANKED}: after k-reciprocal re-ranking, {RerankParameters(*cfg.rerank.values())}")
    if cfg.expansion.top:
        weights = f"weights cosine^{cfg.expansion.alpha:g}" if cfg.expansion.alpha else "equal weights"
        lines.append(f"Queries expanded by their {cfg.expansion.top} nearest gallery images ({weights}).")
    if cfg.protocol == "keep":
        lines.append("protocol keep: matches of the query's own camera count. Published figures leave them out.")
    if any(one.generated for one in evaluations):
        lines.append("Generated persons: fit for comparing models with each other, no statement on real cameras.")
    return "\n".join(lines)


def data_of_each_set(data: DataConfig) -> list[DataConfig]:
    """The configuration of every set that `data.name` lists, separated by commas.

    `data.root` is then one folder that holds them all, or as many folders, in the same order.

    Raises:
        ConfigError: a set without a folder, listed twice, or a common folder that is itself a set.
    """
    names = [name.strip() for name in data.name.split(",")]
    if len(names) == 1:
        return [data]
    if len(set(names)) < len(names) or not all(names) or "auto" in names:
        raise ConfigError(
            f"data.name={data.name}: expected different names of labelled sets, as in data.name=msmt17,market1501."
        )
    if data.root is None:
        raise ConfigError(
            f"data.name={data.name} needs data.root: the folder above all sets, or one folder for each, separated by "
            f"commas, as in data.root=/data/MSMT17,/data/Market-1501"
        )
    roots = [root.strip() for root in data.root.split(",")]
    if len(roots) != len(names):
        roots = [data.root] * len(names)
        if any((Path(data.root) / sign).exists() for sign in ("query", "list_query.txt")):
            raise ConfigError(
                f"data.root={data.root} is the folder of one set, but data.name={data.name} lists {len(names)}. Give "
                f"the folder above them, or one folder for each, separated by commas."
            )
    return [dataclasses.replace(data, name=name, root=root) for name, root in zip(names, roots, strict=True)]


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
    model = load(cfg.model.weights, image_size=cfg.image_size)
    text = f"{model.info.arch} at {model.image_size[0]}x{model.image_size[1]} from {cfg.model.weights}"
    return Subject(model.backbone, text, model.image_size, model.mean, model.std, model.info.arch)


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
    device = ranking_device(device_of(subject.model))
    query, gallery = (
        dataclasses.replace(part, features=part.features.to(device)) for part in _features(cfg, subject, reid_set)
    )
    if cfg.expansion.top:
        query = expanded_queries(query, gallery, cfg.expansion.top, cfg.expansion.alpha)
    rank = functools.partial(
        rank_features,
        query,
        gallery,
        cfg.max_rank,
        protocol=cfg.protocol,
        top=TOP if cfg.per_query else 0,
        progress=True,
    )
    plain = rank()
    reranked = rank(rerank=RerankParameters(*cfg.rerank.values())) if cfg.rerank.enabled else None
    return Evaluation(cfg, subject, reid_set, generated, plain, reranked)


def ranking_device(device: torch.device) -> torch.device:
    """Where to rank by features that a model on `device` made: there, if the compiled operators are, else on the CPU.

    The plain operators are made to be read; on a GPU they would take longer than the compiled ones on the CPU.
    """
    if device.type == "cpu":
        return device
    needed = ("knn", "k_reciprocal", "rerank_matrix", "rank_counts")
    plain = [row for row in ops.report(device.type) if row.op in needed and row.backend != "native"]
    if not plain:
        return device
    logger.info("ranking on the CPU: %s on %s is %s (%s)", plain[0].op, device, plain[0].backend, plain[0].reason)
    return torch.device("cpu")


def _features(cfg: EvaluateConfig, subject: Subject, reid_set: ReIDSet) -> tuple[FeatureSet, FeatureSet]:
    def extract(split: ReIDSplit) -> FeatureSet:
        return extract_features(
            subject.model,
            split.paths,
            subject.image_size,
            subject.mean,
            subject.std,
            cfg.batch_size,
            pids=split.pids,
            camids=split.camids,
            flip=cfg.flip,
            num_workers=reader_count(cfg.data.num_workers),
        )

    if cfg.cache is None:
        return extract(reid_set.query), extract(reid_set.gallery)
    origin = {
        "kind": subject.kind,
        "weights": weights_digest(subject.model),
        "image_size": list(subject.image_size),
        "mean": list(subject.mean),
        "std": list(subject.std),
        "flip": cfg.flip,
        "device": device_of(subject.model).type,
        "backend": cfg.kernels.backend,
    }
    cache = FeatureCache(cfg.cache, origin)
    return cache.get(reid_set.query, extract), cache.get(reid_set.gallery, extract)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="personvit evaluate",
        description="Retrieval quality of a backbone on a labelled person ReID set (no data.root: generated persons).",
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
    }
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    cfg = load_config(EvaluateConfig, arguments.config, [*given, *arguments.overrides])
    if arguments.print_config:
        sys.stdout.write(to_yaml(cfg))
        return 0
    for file in (cfg.out, cfg.per_query):
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
    return 0


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
