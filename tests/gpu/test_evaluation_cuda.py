"""Evaluation on a CUDA device gives what it gives on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from personvit.retrieval import FeatureSet, RerankParameters, expand_queries, rank_features, rerank


@pytest.fixture(scope="module")
def sets():
    """Query and gallery: 60 identities with 11 images each, three cameras."""
    generator = torch.Generator().manual_seed(0)
    pids = torch.arange(60).repeat(11)
    features = F.normalize(torch.randn(60, 64, generator=generator)[pids] + torch.randn(660, 64, generator=generator))
    camids = torch.randint(3, (660,), generator=generator)

    def part(rows, device):
        return FeatureSet(features[rows].to(device), pids[rows].numpy(), camids[rows].numpy(), [""] * 660)

    return {device: (part(slice(0, 120), device), part(slice(120, 660), device)) for device in ("cpu", "cuda")}


@pytest.mark.parametrize("values", [None, (20, 6, 0.3), (50, 15, 0.3)])
def test_ranking(sets, values):
    parameters = None if values is None else RerankParameters(*values)
    on_cpu, on_gpu = (rank_features(*sets[device], rerank=parameters, top=5) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(on_gpu.result.all_AP, on_cpu.result.all_AP, atol=1e-4)
    np.testing.assert_array_equal(on_gpu.result.valid, on_cpu.result.valid)
    assert (on_gpu.top == on_cpu.top).mean() > 0.999


def test_lists_and_expansion(sets):
    lists = {device: rerank(*(part.features for part in sets[device]), top=9) for device in sets}
    assert (lists["cuda"].indices.cpu() == lists["cpu"].indices).float().mean() > 0.999
    expanded = {device: expand_queries(*(part.features for part in sets[device]), top=3, alpha=2.0) for device in sets}
    torch.testing.assert_close(expanded["cuda"].cpu(), expanded["cpu"], atol=1e-5, rtol=0)
