"""Laws of the ranking metrics, and a direct transcription of their definition as oracle."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from personvit.errors import DataError
from personvit.retrieval import rank_metrics


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    queries, gallery = draw(st.integers(1, 8)), draw(st.integers(1, 24))
    levels = draw(st.sampled_from([2, 5, 1000]))  # few levels: ties everywhere
    distmat = (rng.integers(0, levels, (queries, gallery)) / levels).astype(np.float32)
    ids, cameras = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    return (
        distmat,
        rng.integers(0, ids, queries),
        rng.integers(0, ids, gallery),
        rng.integers(0, cameras, queries),
        rng.integers(0, cameras, gallery),
    )


def by_definition(distmat, q_pids, g_pids, q_camids, g_camids, max_rank):
    """Walk down each stable ranking, one entry at a time."""
    precisions, penalties, curves = [], [], []
    for query, row in enumerate(distmat):
        position = matches = 0
        terms, curve = [], []
        for index in sorted(range(len(row)), key=lambda g: (row[g], g)):
            if g_pids[index] == q_pids[query] and g_camids[index] == q_camids[query]:
                continue
            position += 1
            if g_pids[index] == q_pids[query]:
                matches += 1
                terms.append(matches / position)
            curve.append(float(matches > 0))
        if terms:
            precisions.append(sum(terms) / matches)
            penalties.append(terms[-1])
            padded = curve + [curve[-1]] * max_rank
            curves.append(padded[: min(max_rank, len(row))])
    return precisions, penalties, np.mean(curves, axis=0) if curves else None


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, 30))
def test_equals_the_definition(problem, max_rank):
    precisions, penalties, cmc = by_definition(*problem, max_rank)
    if not precisions:
        try:
            rank_metrics(*problem, max_rank=max_rank)
        except DataError:
            return
        raise AssertionError("no valid query, but no error")
    result = rank_metrics(*problem, max_rank=max_rank)
    np.testing.assert_allclose(result.all_AP, precisions, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.all_INP, penalties, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.cmc, cmc, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_order_of_queries_and_of_an_untied_gallery_is_irrelevant(problem, random):
    distmat, q_pids, g_pids, q_camids, g_camids = problem
    distmat = np.argsort(np.argsort(distmat, axis=1, kind="stable"), axis=1).astype(np.float32)  # ranks: no ties
    try:
        before = rank_metrics(distmat, q_pids, g_pids, q_camids, g_camids)
    except DataError:
        assume(False)
    q_order, g_order = list(range(len(q_pids))), list(range(len(g_pids)))
    random.shuffle(q_order)
    random.shuffle(g_order)
    after = rank_metrics(
        distmat[q_order][:, g_order], q_pids[q_order], g_pids[g_order], q_camids[q_order], g_camids[g_order]
    )
    np.testing.assert_allclose(after.mAP, before.mAP, rtol=1e-12)
    np.testing.assert_array_equal(after.cmc, before.cmc)
    np.testing.assert_array_equal(after.valid, before.valid[q_order])


@settings(max_examples=60, deadline=None)
@given(problems())
def test_bounds(problem):
    try:
        result = rank_metrics(*problem)
    except DataError:
        assume(False)
    assert 0 < result.mINP <= 1
    assert 0 < result.mAP <= 1
    assert np.all(np.diff(result.cmc) >= 0)
    assert len(result.all_AP) == len(result.all_INP) == result.valid.sum()


@settings(max_examples=60, deadline=None)
@given(problems())
def test_monotone_transform_of_distances_changes_nothing(problem):
    distmat, *labels = problem
    try:
        before = rank_metrics(distmat, *labels)
    except DataError:
        assume(False)
    after = rank_metrics(distmat * 4 - 3, *labels)  # keeps order and ties: the levels lie far apart
    np.testing.assert_array_equal(after.all_AP, before.all_AP)
