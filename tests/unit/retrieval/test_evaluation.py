from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from personvit.errors import DataError
from personvit.retrieval import FeatureSet, evaluate_features, pairwise_distance, rank_metrics
from personvit.retrieval import evaluation as module


def features(count, seed, dim=16, ids=12, pids=None):
    rng = np.random.default_rng(seed)
    vectors = F.normalize(torch.from_numpy(rng.standard_normal((count, dim)).astype(np.float32)), dim=1)
    pids = rng.integers(0, ids, count) if pids is None else np.asarray(pids)
    return FeatureSet(vectors, pids, rng.integers(0, 3, count), [""] * count)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_give_the_result_of_the_whole_matrix(monkeypatch, block):
    query, gallery = features(33, 0), features(129, 1)
    whole = rank_metrics(
        pairwise_distance(query.features, gallery.features), query.pids, gallery.pids, query.camids, gallery.camids
    )
    monkeypatch.setattr(module, "_BLOCK", block)
    result = evaluate_features(query, gallery)
    assert result.mAP == pytest.approx(whole.mAP, abs=1e-12)
    np.testing.assert_array_equal(result.cmc, whole.cmc)
    np.testing.assert_array_equal(result.valid, whole.valid)


def test_perfect_features_score_one():
    pids = np.arange(5)
    query = FeatureSet(torch.eye(5), pids, np.zeros(5, np.int64), [""] * 5)
    gallery = FeatureSet(torch.eye(5), pids, np.ones(5, np.int64), [""] * 5)
    result = evaluate_features(query, gallery)
    assert (result.mAP, result.rank(1), result.mINP) == (1.0, 1.0, 1.0)


def test_features_without_labels_are_refused():
    with pytest.raises(DataError, match="query features carry no identities"):
        evaluate_features(features(3, 0, pids=[-1, -1, -1]), features(3, 1))


def test_features_of_two_models_are_refused():
    with pytest.raises(DataError, match="16 dimensions, gallery features 8"):
        evaluate_features(features(3, 0), features(3, 1, dim=8))


def test_empty_sides_are_named():
    with pytest.raises(DataError, match="3 queries against 0 gallery images"):
        evaluate_features(features(3, 0), features(0, 1))
