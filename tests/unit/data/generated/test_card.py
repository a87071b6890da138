"""The card's own ranking figures, and what a set must be like to be worth learning from."""

from __future__ import annotations

import numpy as np
import pytest

from personvit.data.generated.card import average_precision


def test_average_precision_by_hand() -> None:
    query = np.array([[0.0]], np.float32)
    gallery = np.array([[0.1], [0.2], [0.3], [0.4], [0.5], [0.05]], np.float32)
    # Nearest first: junk (-1, dropped), same person and camera (dropped), wrong, right, distractor, right.
    labels = np.array([[7, 1], [8, 2], [7, 2], [0, 1], [7, 3], [-1, 2]], np.int64)
    score, rank1 = average_precision(query, gallery, np.array([[7, 1]], np.int64), labels)
    assert score == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert rank1 == 0.0


def test_a_query_without_a_match_does_not_count() -> None:
    query = np.array([[0.0], [1.0]], np.float32)
    gallery = np.array([[0.0], [1.0]], np.float32)
    labels = np.array([[1, 2], [2, 2]], np.int64)
    assert average_precision(query, gallery, np.array([[1, 1], [2, 2]], np.int64), labels) == (1.0, 1.0)
    assert average_precision(query, gallery, np.array([[5, 1], [6, 1]], np.int64), labels) == (0.0, 0.0)


def test_agrees_with_the_retrieval_metrics() -> None:
    retrieval = pytest.importorskip("personvit.retrieval")
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(40, 5)).astype(np.float32), rng.normal(size=(120, 5)).astype(np.float32)
    query_labels = np.stack([rng.integers(1, 9, 40), rng.integers(0, 4, 40)], axis=1)
    gallery_labels = np.stack([rng.integers(0, 9, 120), rng.integers(0, 4, 120)], axis=1)
    distmat = ((query[:, None] - gallery[None]) ** 2).sum(axis=2)
    expected = retrieval.rank_metrics(
        distmat, query_labels[:, 0], gallery_labels[:, 0], query_labels[:, 1], gallery_labels[:, 1]
    )
    score, rank1 = average_precision(query, gallery, query_labels, gallery_labels)
    assert score == pytest.approx(float(expected.mAP), abs=1e-6)
    assert rank1 == pytest.approx(float(expected.cmc[0]), abs=1e-6)
