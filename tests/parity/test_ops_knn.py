"""Native neighbours equal the reference in every bit, and a float64 oracle within float32 rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch

from personvit.ops import native, reference_retrieval


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
    distances, indices, row_max = native.knn(query, gallery, k)
    expected_distances, expected_indices, expected_max = reference_retrieval.knn(query, gallery, k)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(distances, expected_distances)
    assert torch.equal(row_max, expected_max)


@pytest.mark.parametrize("rows", [1, 17, 240, 241, 600, 1000])
def test_a_set_against_itself(rows: int) -> None:
    features = torch.randn(rows, 20)
    features[rows // 2] = features[0]
    k = min(rows, 7)
    expected = native.knn(features, features.clone(), k)  # which the operator cannot know to be the same
    for result in (
        native.knn(features, features, k),
        native.knn_itself(features, k, 3, lambda step: None),
        reference_retrieval.knn(features, features, k),
    ):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_many_ties_and_special_values() -> None:
    query = torch.randint(0, 2, (40, 6)).float()
    gallery = torch.randint(0, 2, (300, 6)).float()
    gallery[5, 0], gallery[9, 1], gallery[100, 2] = torch.nan, torch.inf, -torch.inf
    distances, indices, row_max = native.knn(query, gallery, 300)
    expected_distances, expected_indices, expected_max = reference_retrieval.knn(query, gallery, 300)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(row_max, expected_max)
    torch.testing.assert_close(distances, expected_distances, rtol=0, atol=0, equal_nan=True)


def test_against_float64() -> None:
    query = torch.nn.functional.normalize(torch.randn(50, 384), dim=1)
    gallery = torch.nn.functional.normalize(torch.randn(400, 384), dim=1)
    gallery[:50] = query + 1e-4 * torch.randn(50, 384)  # near duplicates: what |q|^2 + |g|^2 - 2qg cannot resolve
    distances, indices, row_max = native.knn(query, gallery, 400)
    exact = (query.double()[:, None] - gallery.double()[None]).square().sum(2)
    plain = (query[:, None] - gallery[None]).square().sum(2).double()
    ours = torch.empty_like(exact).scatter_(1, indices, distances.double())
    relative, theirs = ((ours - exact) / exact).abs(), ((plain - exact) / exact).abs()
    assert relative.max() <= 2 * theirs.max()
    assert relative.max() < 2e-6
    assert torch.equal(indices[:, 0], torch.arange(50))
    assert torch.equal(row_max, distances[:, -1])


@pytest.mark.parametrize("features", [0, 1, 31, 32, 33, 384])
def test_pairwise_distance(features: int) -> None:
    query, gallery = torch.randn(50, features), torch.randn(37, features)
    distances = native.pairwise_distance(query, gallery)
    assert torch.equal(distances, reference_retrieval.squared_distances(query, gallery))
    assert torch.equal(distances, native.pairwise_distance(gallery, query).T)


def test_the_reference_rounds_once() -> None:
    """Its fused multiply-add against exact rational arithmetic, on sums where two roundings go wrong."""
    total = torch.cat([torch.tensor([1.0, 2.0**-140, 2.0e38, 1.0, 0.0]), torch.rand(2000)])
    x = torch.cat([torch.tensor([2.0**-12, 2.0**-70, 1.0e19, 2.0**-60, 0.0]), torch.randn(2000) * 1e-3])
    fused = reference_retrieval._add_square(total, x)
    for a, b, c in zip(total.tolist(), x.tolist(), fused.tolist(), strict=True):
        exact = Fraction(a) + Fraction(b) ** 2
        below, above = (float(torch.nextafter(torch.tensor(c), torch.tensor(y))) for y in (-math.inf, math.inf))
        assert abs(Fraction(c) - exact) <= min(abs(Fraction(below) - exact), abs(Fraction(above) - exact))
