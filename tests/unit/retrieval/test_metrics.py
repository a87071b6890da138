from __future__ import annotations

import numpy as np
import pytest
import torch

from personvit.errors import DataError
from personvit.retrieval import rank_metrics


def test_worked_example():
    # Order of query 0 by distance: junk (same pid and camera), match, other, match -> matches at ranks 1 and 3.
    result = rank_metrics(
        torch.tensor([[0.1, 0.2, 0.3, 0.4]]),
        q_pids=[7],
        g_pids=[7, 7, 5, 7],
        q_camids=[0],
        g_camids=[0, 1, 1, 2],
        max_rank=3,
    )
    assert result.mAP == pytest.approx((1 / 1 + 2 / 3) / 2, abs=1e-15)
    assert result.mINP == pytest.approx(2 / 3, abs=1e-15)
    np.testing.assert_array_equal(result.cmc, np.ones(3, np.float32))


def test_short_gallery_keeps_the_last_cmc_value():
    # Query 0 keeps one entry after junk removal, query 1 keeps three: ragged rows upstream.
    result = rank_metrics(
        np.array([[0.0, 0.1, 0.2], [0.1, 0.2, 0.3]], np.float32),
        q_pids=[1, 2],
        g_pids=[1, 1, 2],
        q_camids=[0, 0],
        g_camids=[0, 1, 1],
        max_rank=50,
    )
    np.testing.assert_allclose(result.cmc, [0.5, 0.5, 1.0])
    assert result.rank(1) == 0.5
    assert result.rank(10) == 1.0


def test_ties_follow_the_gallery_index():
    flat = np.zeros((1, 4), np.float32)
    first = rank_metrics(flat, [1], [1, 2, 2, 2], [0], [1, 1, 1, 1])
    last = rank_metrics(flat, [1], [2, 2, 2, 1], [0], [1, 1, 1, 1])
    assert (first.mAP, last.mAP) == (1.0, 0.25)


def test_junk_does_not_count_among_ties():
    result = rank_metrics(np.zeros((1, 3), np.float32), [1], [1, 1, 1], [0], [0, 0, 1])
    assert result.mAP == 1.0


def test_invalid_queries_are_in_no_average():
    distmat = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], np.float32)
    result = rank_metrics(distmat, q_pids=[9, 1, 2], g_pids=[1, 2], q_camids=[0, 0, 0], g_camids=[1, 0])
    np.testing.assert_array_equal(result.valid, [False, True, False])
    assert result.mAP == 1.0
    assert result.all_AP.shape == (1,)


@pytest.mark.parametrize(
    ("g_pids", "g_camids", "expected"),
    [
        ([8, 9], [1, 1], "2 have an identity that is absent from the gallery, 0 one"),
        ([1, 2], [0, 0], "0 have an identity that is absent from the gallery, 2 one .* own camera only"),
    ],
)
def test_no_valid_query_names_the_cause(g_pids, g_camids, expected):
    with pytest.raises(DataError, match=expected):
        rank_metrics(np.zeros((2, 2), np.float32), [1, 2], g_pids, [0, 0], g_camids)


def test_empty_gallery_is_named():
    with pytest.raises(DataError, match="1 queries against 0 gallery images"):
        rank_metrics(np.zeros((1, 0), np.float32), [1], [], [0], [])


def test_nan_is_refused():
    with pytest.raises(DataError, match="query 1 hold NaN"):
        rank_metrics(np.array([[0.0], [np.nan]], np.float32), [1, 1], [1], [0, 0], [1])


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"distmat is \(2, 3\), the labels say \(2, 2\)"):
        rank_metrics(np.zeros((2, 3), np.float32), [1, 1], [1, 1], [0, 0], [1, 1])
    with pytest.raises(ValueError, match="max_rank=0"):
        rank_metrics(np.zeros((1, 1), np.float32), [1], [1], [0], [1], max_rank=0)
