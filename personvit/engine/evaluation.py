"""Evaluating a model on a labelled set: features, ranking, re-ranking, and the figures as a table."""

from __future__ import annotations

import dataclasses
import functools
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from personvit import __version__, ops
from personvit.config import EvaluateConfig, to_plain
from personvit.data.loaders import reader_count
from personvit.data.reid_sets import ReIDSet, ReIDSplit
from personvit.retrieval.cache import FeatureCache, weights_digest
from personvit.retrieval.evaluation import Ranking, expanded_queries, rank_features
from personvit.retrieval.features import Backbone, FeatureSet, device_of, extract_features
from personvit.retrieval.metrics import RankingResult
from personvit.retrieval.report import RERANKED, TOP, plain_figures, table
from personvit.retrieval.rerank import RerankParameters
from personvit.runtime.distributed import Ranks

logger = logging.getLogger(__name__)


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
            + (" in another camera (protocol market)" if cfg.protocol == "market" else " (protocol keep)")
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


def evaluate_set(
    cfg: EvaluateConfig,
    subject: Subject,
    reid_set: ReIDSet,
    *,
    generated: bool = False,
    ranks: Ranks | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a model on a set that is read already.

    Args:
        cfg: how to; `cfg.data` and `cfg.model` are only recorded.
        subject: the model.
        reid_set: query and gallery.
        generated: whether these are generated persons; the report says so.
        ranks: share the work of the features with these processes, all of which must call. None: do it alone.
        progress: show bars if there is a terminal and the work is long.

    Raises:
        DataError: an image cannot be read, or no query is valid.
    """
    device = ranking_device(device_of(subject.model))
    query, gallery = (
        dataclasses.replace(part, features=part.features.to(device))
        for part in _features(cfg, subject, reid_set, ranks, progress)
    )
    if cfg.expansion.top:
        query = expanded_queries(query, gallery, cfg.expansion.top, cfg.expansion.alpha)
    rank = functools.partial(
        rank_features,
        query,
        gallery,
        cfg.max_rank,
        protocol=cfg.protocol,
        top=TOP if cfg.per_query or cfg.rank_lists else 0,
        progress=progress,
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


def _features(
    cfg: EvaluateConfig, subject: Subject, reid_set: ReIDSet, ranks: Ranks | None, progress: bool
) -> tuple[FeatureSet, FeatureSet]:
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
            progress=progress,
            ranks=ranks,
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
        **_cameras_that_matter(subject.model, reid_set),
        "device": device_of(subject.model).type,
        "backend": cfg.kernels.backend,
    }
    cache = FeatureCache(cfg.cache, origin)
    return cache.get(reid_set.query, extract), cache.get(reid_set.gallery, extract)


def _cameras_that_matter(model: Backbone, reid_set: ReIDSet) -> dict[str, Any]:
    """Cameras of the images and the factor of their vectors, where the features depend on them."""
    if int(getattr(model, "num_cameras", 0)) < 2:
        return {}
    cameras = [zlib.crc32(part.camids.tobytes()) for part in (reid_set.query, reid_set.gallery)]
    return {"cameras": cameras, "sie_coefficient": getattr(model, "sie_coefficient", None)}
