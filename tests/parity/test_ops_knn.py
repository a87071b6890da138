"""Native neighbours equal the reference in every bit, and a float64 oracle within float32 rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from personvit.ops import native, reference


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN, so that a value that was never written shows."""
    if native.load_cpu() is not None:
        pytest.fail(f"{native.load_cpu()}: {native.BUILD_COMMAND}")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("queries", [1, 19, 63, 65])
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (15, 15), (33, 5), (129, 129), (1023, 10)])
@pytest.mark.parametrize("features", [1, 31, 33, 128])
def test_same_bits(queries: int, rows: int, k: int, features: int) -> None:
    query, gallery = torch.randn(queries, features), torch.randn(rows, features)
    gallery[rows // 2] = gallery[0]  # at least one tie
    distances, indices = native.knn(query, gallery, k)
    expected_distances, expected_indices = reference.knn(query, gallery, k)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(distances, expected_distances)


def test_many_ties_and_special_values() -> None:
    query = torch.randint(0, 2, (40, 6)).float()
    gallery = torch.randint(0, 2, (300, 6)).float()
    gallery[5, 0], gallery[9, 1], gallery[100, 2] = torch.nan, torch.inf, -torch.inf
    distances, indices = native.knn(query, gallery, 300)
    expected_distances, expected_indices = reference.knn(query, gallery, 300)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(distances, expected_distances, rtol=0, atol=0, equal_nan=True)


def test_against_float64() -> None:
    query = torch.nn.functional.normalize(torch.randn(50, 384), dim=1)
    gallery = torch.nn.functional.normalize(torch.randn(400, 384), dim=1)
    gallery[:50] = query + 1e-4 * torch.randn(50, 384)  # near duplicates: what |q|^2 + |g|^2 - 2qg cannot resolve
    distances, indices = native.knn(query, gallery, 400)
    exact = (query.double()[:, None] - gallery.double()[None]).square().sum(2)
    plain = (query[:, None] - gallery[None]).square().sum(2).double()
    ours = torch.empty_like(exact).scatter_(1, indices, distances.double())
    relative, theirs = ((ours - exact) / exact).abs(), ((plain - exact) / exact).abs()
    assert relative.max() <= 2 * theirs.max()
    assert relative.max() < 2e-6
    assert torch.equal(indices[:, 0], torch.arange(50))
