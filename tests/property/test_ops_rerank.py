from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from personvit import ops


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int, float]:
    queries, gallery, features = draw(st.integers(1, 30)), draw(st.integers(1, 80)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        points = torch.randn(queries + gallery, features, generator=generator)
    else:  # few values: ties and duplicates everywhere
        points = 1.0 + torch.randint(0, 2, (queries + gallery, features), generator=generator)
    k1, k2 = draw(st.integers(1, 60)), draw(st.integers(1, 20))
    return points[:queries], points[queries:], k1, k2, draw(st.sampled_from([0.0, 0.3, 1.0]))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_threads_blocks_and_lists_agree(problem: tuple[Tensor, Tensor, int, int, float]) -> None:
    query, gallery, k1, k2, lambda_value = problem
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ops.rerank(query, gallery, k1, k2, lambda_value)
        encoding = ops.encode(query, gallery, k1, k2)
        for count in (2, 8):
            torch.set_num_threads(count)
            assert torch.equal(ops.rerank(query, gallery, k1, k2, lambda_value), expected)
            for a, b in zip(ops.encode(query, gallery, k1, k2), encoding, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)
    middle = len(query) // 2
    parts = [(0, middle), (middle, len(query))]
    blocks = [ops.rerank_block(query, gallery, encoding, lambda_value, *part) for part in parts]
    assert torch.equal(torch.cat(blocks), expected)
    distances, indices = ops.rerank(query, gallery, k1, k2, lambda_value, top=7)
    order = expected.sort(dim=1, stable=True)
    assert torch.equal(distances, order.values[:, :7])
    assert torch.equal(indices, order.indices[:, :7])


@settings(max_examples=60, deadline=None)
@given(problems())
def test_ranges(problem: tuple[Tensor, Tensor, int, int, float]) -> None:
    query, gallery, k1, k2, lambda_value = problem
    encoding = ops.encode(query, gallery, k1, k2)
    rows = len(query) + len(gallery)
    assert (encoding.values > 0).all()
    for row in range(rows):
        columns = encoding.indices[encoding.indptr[row] : encoding.indptr[row + 1]]
        assert (columns.diff() > 0).all()
    jaccard = ops.jaccard(encoding.indptr, encoding.indices, encoding.values, len(query))
    assert jaccard.min() >= 0
    assert jaccard.max() <= 1
    final = ops.rerank(query, gallery, k1, k2, lambda_value)
    assert final.min() >= 0
    assert final.max() <= 1 + 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(20, 70), st.randoms(use_true_random=False))
def test_permuted_gallery_permutes_the_result(seed: int, queries: int, gallery: int, random) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(queries + gallery, 24, generator=generator)  # no ties
    query, rows = points[:queries], points[queries:]
    order = torch.tensor(random.sample(range(gallery), gallery))
    # The columns of a sum come in another order: equal up to rounding.
    expected = ops.rerank(query, rows, 10, 4)[:, order]
    torch.testing.assert_close(ops.rerank(query, rows[order], 10, 4), expected, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(5, 70), st.sampled_from([0.1, 0.3, 1.0]))
def test_an_equal_row_comes_first(seed: int, queries: int, gallery: int, lambda_value: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, rows = torch.randn(queries, 16, generator=generator), torch.randn(gallery, 16, generator=generator)
    twin = torch.randperm(gallery, generator=generator)[0]
    rows[twin] = query[0]
    distances = ops.rerank(query, rows, 8, 3, lambda_value)[0]
    assert distances.argmin() == twin
