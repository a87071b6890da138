from __future__ import annotations

import pytest
import torch

from personvit.retrieval import pairwise_distance
from personvit.retrieval.distances import distance_blocks


@pytest.mark.parametrize(
    ("queries", "gallery", "dim"), [(1, 1, 1), (19, 33, 63), (0, 5, 8), (7, 0, 8), (127, 129, 384)]
)
def test_matches_float64(queries, gallery, dim):
    q, g = torch.randn(queries, dim), torch.randn(gallery, dim)
    exact = (q.double()[:, None] - g.double()[None]).square().sum(-1)
    distmat = pairwise_distance(q, g)
    assert distmat.dtype == torch.float32
    torch.testing.assert_close(distmat.double(), exact, rtol=1e-5, atol=1e-5 * dim)


def test_arguments_stay_as_they_were():
    q = torch.randn(4, 6).t()  # not contiguous
    before = q.clone()
    pairwise_distance(q, q)
    assert torch.equal(q, before)


def test_autocast_and_matmul_precision_do_not_lower_it():
    q, g = torch.randn(16, 64), torch.randn(32, 64)
    expected = pairwise_distance(q, g)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(pairwise_distance(q, g), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 40])
def test_blocks_are_the_rows_of_the_matrix_in_one_memory(rows: int) -> None:
    q, g = torch.randn(17, 24), torch.randn(29, 24)
    places, blocks = set(), []
    for block in distance_blocks(q, g, rows):
        places.add(block.data_ptr())
        blocks.append(block.clone())
    assert [len(block) for block in blocks] == [len(part) for part in q.split(rows)]
    torch.testing.assert_close(torch.cat(blocks), pairwise_distance(q, g), rtol=1e-6, atol=1e-5)
    assert len(places) == 1
