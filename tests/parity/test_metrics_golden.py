"""Ranking metrics against values of the published evaluation code (hustvl/PersonViT, JDAI-CV/fast-reid)."""

from __future__ import annotations

import numpy as np
import pytest

from personvit.retrieval import rank_metrics


@pytest.mark.parametrize("case", ["basic", "smallg", "ties"])
def test_equals_published_code(golden, case):
    data = golden(f"eval_{case}")
    result = rank_metrics(
        data["distmat"],
        data["q_pids"],
        data["g_pids"],
        data["q_camids"],
        data["g_camids"],
        max_rank=int(data["max_rank"]),
    )

    def expected(key: str) -> np.ndarray:
        return data.get(f"{key}_stable", data[key])

    assert result.cmc.dtype == np.float32
    np.testing.assert_allclose(result.cmc, expected("cmc"), rtol=0, atol=1e-7)
    np.testing.assert_allclose(result.mAP, expected("mAP"), rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.all_AP, expected("all_AP"), rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.mINP, expected("mINP"), rtol=0, atol=1e-12)
    if case != "ties":  # the published values of single queries exist for the unstable order only
        np.testing.assert_allclose(result.all_INP, data["all_INP"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(result.valid, data["valid"])


def test_ties_are_ordered_by_gallery_index_not_by_the_unstable_sort(golden):
    data = golden("eval_ties")
    result = rank_metrics(*(data[key] for key in ("distmat", "q_pids", "g_pids", "q_camids", "g_camids")))
    assert abs(result.mAP - float(data["mAP"])) > 1e-4
