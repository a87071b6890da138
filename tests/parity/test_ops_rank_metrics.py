"""Ranking by counting against the published values and, bit by bit, against sorting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from personvit import ops
from personvit.ops import native, reference_retrieval


@pytest.fixture(autouse=True)
def _extension() -> None:
    if native.load_cpu() is not None:
        pytest.fail(f"{native.load_cpu()}: {native.BUILD_COMMAND}")


@pytest.mark.parametrize("name", ["eval_basic", "eval_smallg", "eval_ties"])
def test_rank_metrics_golden(golden, name: str) -> None:
    values = golden(name)
    suffix = "_stable" if "all_AP_stable" in values else ""
    labels = [torch.from_numpy(values[key]) for key in ("q_pids", "g_pids", "q_camids", "g_camids")]
    precision, penalty, first, matches = ops.rank_counts(torch.from_numpy(values["distmat"]), *labels)
    valid = matches > 0
    np.testing.assert_array_equal(valid.numpy(), values["valid"])
    np.testing.assert_allclose(precision[valid].numpy(), values[f"all_AP{suffix}"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(precision[valid].mean().item(), values[f"mAP{suffix}"], rtol=0, atol=1e-12)
    if name != "eval_ties":  # published with an arbitrary order of ties only
        np.testing.assert_allclose(penalty[valid].numpy(), values["all_INP"], rtol=0, atol=1e-12)
    ranks = torch.arange(1, len(values[f"cmc{suffix}"]) + 1)
    cmc = (first[valid, None] <= ranks).double().mean(dim=0)
    np.testing.assert_allclose(cmc.numpy(), values[f"cmc{suffix}"], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("queries", "gallery"), [(1, 1), (0, 5), (5, 0), (30, 257), (9, 5000)])
@pytest.mark.parametrize("levels", [3, 1 << 20])
def test_rank_metrics_by_sorting(queries: int, gallery: int, levels: int) -> None:
    distances = torch.randint(0, levels, (queries, gallery)).float() / 7
    labels = [torch.randint(0, 12, (size,)) for size in (queries, gallery)]
    cameras = [torch.randint(0, 3, (size,)) for size in (queries, gallery)]
    arguments = (distances, labels[0], labels[1], cameras[0], cameras[1])
    for a, b in zip(native.rank_counts(*arguments), reference_retrieval.rank_counts(*arguments), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
