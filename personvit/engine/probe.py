"""Periodic retrieval probe: what the features are worth on a labelled split, without any fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from personvit.data.reid_sets import ReIDSet, ReIDSplit, open_reid_set
from personvit.retrieval.evaluation import evaluate_backbone
from personvit.retrieval.features import Backbone

logger = logging.getLogger(__name__)


class RetrievalProbe:
    """mAP and rank-1 of a backbone on the query and gallery of a labelled set.

    A set with more than `max_images` images is cut down once, to the same images in every run; figures of a cut set
    are for comparison within the run only (a smaller gallery is an easier one).

    Args:
        root: labelled set; its layout is recognised.
        image_size: height, width.
        mean: of the training images.
        std: of the training images.
        max_images: limit of query and gallery together.
        batch_size: images per forward pass.

    Raises:
        DataError: no labelled set there.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        max_images: int = 4000,
        batch_size: int = 64,
    ) -> None:
        whole = open_reid_set("auto", root)
        self.reid_set = subset(whole, max_images)
        self.image_size = image_size
        self.mean = mean
        self.std = std
        self.batch_size = batch_size
        if self.reid_set is not whole:
            logger.info(
                "retrieval probe: %d of %d query and %d of %d gallery images of %s",
                len(self.reid_set.query), len(whole.query), len(self.reid_set.gallery), len(whole.gallery), root,
            )  # fmt: skip

    def run(self, backbone: Backbone) -> dict[str, float]:
        """`probe_mAP` and `probe_rank1`, both in [0, 1]. The backbone stays on its device and in its mode."""
        result = evaluate_backbone(
            backbone, self.reid_set, self.image_size, self.mean, self.std, self.batch_size, progress=False
        )
        return {"probe_mAP": result.mAP, "probe_rank1": result.rank(1)}


def subset(reid_set: ReIDSet, max_images: int) -> ReIDSet:
    """At most about `max_images` query and gallery images: whole query identities, and their share of the others.

    Identities are taken in a fixed shuffled order until the budget is spent, one at least. Gallery images of
    identities that nobody searches for (distractors) are thinned out evenly, by the same factor.

    Returns:
        The set itself if it is small enough; else one without its training split.
    """
    query, gallery = reid_set.query, reid_set.gallery
    total = len(query) + len(gallery)
    if total <= max_images:
        return reid_set
    searched = np.isin(gallery.pids, query.pids)
    distractors = np.flatnonzero(~searched)
    distractors = distractors[:: max(1, -(-total // max_images))]
    budget = max_images - len(distractors)
    pids = np.random.default_rng(0).permutation([p for p in np.unique(query.pids) if _can_match(reid_set, p)])
    sizes = np.array([(query.pids == pid).sum() + (gallery.pids == pid).sum() for pid in pids])
    chosen = pids[: max(1, int(np.searchsorted(np.cumsum(sizes), budget, side="right")))]
    kept = np.sort(np.concatenate([np.flatnonzero(np.isin(gallery.pids, chosen)), distractors]))
    nothing = _take(reid_set.train, np.zeros(0, dtype=np.int64))
    return replace(
        reid_set,
        train=nothing,
        query=_take(query, np.flatnonzero(np.isin(query.pids, chosen))),
        gallery=_take(gallery, kept),
    )


def _can_match(reid_set: ReIDSet, pid: int) -> bool:
    """Whether some query of the identity has a match in another camera."""
    shown = reid_set.gallery.camids[reid_set.gallery.pids == pid]
    searched = reid_set.query.camids[reid_set.query.pids == pid]
    return len(shown) > 0 and len(np.union1d(shown, searched)) > 1


def _take(split: ReIDSplit, indices: npt.NDArray[np.int64]) -> ReIDSplit:
    return ReIDSplit([split.paths[i] for i in indices], split.pids[indices], split.camids[indices])
