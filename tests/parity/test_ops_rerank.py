"""The stages of re-ranking: neighbours against the published ones, all of them against their references bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from personvit import ops
from personvit.ops import native
from personvit.ops import reference_retrieval as reference


@pytest.fixture(autouse=True)
def _extension() -> None:
    if native.load_cpu() is not None:
        pytest.fail(f"{native.load_cpu()}: {native.BUILD_COMMAND}")


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_golden_neighbours(golden, name: str) -> None:
    values = golden(f"rerank_{name}")
    points = torch.from_numpy(np.concatenate([values["q"], values["g"]]))
    ranks = values["initial_rank_stable" if "initial_rank_stable" in values else "initial_rank"]
    distances, indices, row_max = ops.nearest(points, points, ranks.shape[1])
    np.testing.assert_array_equal(indices.numpy(), ranks)
    normalised = np.take_along_axis(values["orig_dist_norm"], ranks.astype(np.int64), axis=1)
    np.testing.assert_allclose((distances / row_max[:, None]).numpy(), normalised, rtol=0, atol=5e-7)


def clusters(queries: int, gallery: int, features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, gallery // 8), features, generator=generator)
    labels = torch.randint(0, len(centres), (queries + gallery,), generator=generator)
    points = centres[labels] + 0.5 * torch.randn(queries + gallery, features, generator=generator)
    points = torch.nn.functional.normalize(points, dim=1)
    points[-1] = points[0]  # a gallery row equal to a query
    if gallery > 3:
        points[queries + 1] = points[queries]  # and a twin in the gallery
    return points[:queries], points[queries:]


SHAPES = [(1, 1, 3), (2, 5, 1), (7, 24, 16), (40, 160, 33), (130, 400, 20)]


@pytest.mark.parametrize(("queries", "gallery", "features"), SHAPES)
@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (50, 15), (1, 1), (3, 2), (7, 9)])
def test_stages_have_the_bits_of_the_reference(queries: int, gallery: int, features: int, k1: int, k2: int) -> None:
    left, right = clusters(queries, gallery, features)
    points = torch.cat([left, right])
    width = min(max(k1 + 1, k2), len(points))
    _, neighbours, row_max = native.knn(points, points, width)
    lists = neighbours[:, : k1 + 1].contiguous()
    indptr, indices = native.k_reciprocal(lists, k1)
    assert_same(reference.k_reciprocal(lists, k1), (indptr, indices))
    values = native.reciprocal_weights(points, row_max, indptr, indices)
    assert_same((reference.reciprocal_weights(points, row_max, indptr, indices),), (values,))
    sparse = native.query_expansion(indptr, indices, values, neighbours, k2)
    assert_same(reference.query_expansion(indptr, indices, values, neighbours, k2), sparse)
    index = native.inverted_index(*sparse, queries)
    assert_same(reference.inverted_index(*sparse, queries), index)
    rows = (sparse[0][: queries + 1], *sparse[1:], *index)
    assert_same((reference.jaccard(*rows, gallery),), (native.jaccard(*rows, gallery),))
    final = (left, right, row_max[:queries], *rows, 0.3)
    matrix = native.rerank_matrix(*final)
    assert_same((reference.rerank_matrix(*final),), (matrix,))
    top = min(10, gallery)
    lists = native.rerank_lists(*final, top)
    assert_same(reference.rerank_lists(*final, top), lists)
    order = matrix.sort(dim=1, stable=True)
    assert_same((order.values[:, :top], order.indices[:, :top]), lists)


def assert_same(expected: tuple[Tensor, ...], actual: tuple[Tensor, ...]) -> None:
    for a, b in zip(expected, actual, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
