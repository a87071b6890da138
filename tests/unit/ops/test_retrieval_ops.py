from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from personvit import ops
from personvit.errors import ConfigError, DataError
from personvit.ops import native


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    points = torch.nn.functional.normalize(torch.randn(30, 8), dim=1)
    return points[:6], points[6:]


def test_small_example() -> None:
    """Two tight pairs far apart: everyone's only reciprocal neighbour is its twin."""
    query = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    gallery = torch.tensor([[0.0, 1.1], [1.1, 0.0]])
    points = torch.cat([query, gallery])
    _, neighbours, row_max = ops.nearest(points, points, 2)
    assert neighbours.tolist() == [[0, 2], [1, 3], [2, 0], [3, 1]]
    torch.testing.assert_close(row_max, torch.tensor([2.21, 2.21, 2.42, 2.42]))
    indptr, indices = ops.k_reciprocal(neighbours, 1)
    assert indptr.tolist() == [0, 2, 4, 6, 8]
    assert indices.tolist() == [0, 2, 1, 3, 0, 2, 1, 3]
    values = ops.reciprocal_weights(points, row_max, indptr, indices)
    near = math.exp(-0.01 / 2.21)
    torch.testing.assert_close(values[:2], torch.tensor([1 / (1 + near), near / (1 + near)]))
    expanded = ops.query_expansion(indptr, indices, values, neighbours, 2)
    assert expanded[1].tolist() == indices.tolist()
    torch.testing.assert_close(expanded[2][:2], (values[0:2] + values[4:6]) / 2)
    jaccard = ops.jaccard(*expanded, 2)
    assert jaccard[0, 1] == jaccard[1, 0] == 1
    assert jaccard[0, 0] < 1e-6
    final = ops.rerank(query, gallery, 1, 2, 0.3)
    torch.testing.assert_close(final[0, 1], torch.tensor(0.7 + 0.3))
    assert final.argmin(dim=1).tolist() == [0, 1]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_more_neighbours_than_points(pair, backend: str) -> None:
    ops.set_backend(backend)
    try:
        result = ops.rerank(*pair, k1=500, k2=100, lambda_value=0.0)
        assert (result < 1e-6).all()  # everyone is everyone's neighbour, and all rows are averaged
        distances, indices = ops.rerank(*pair, k1=500, k2=100, top=1000)
        assert distances.shape == indices.shape == (6, 24)
    finally:
        ops.set_backend("auto")


def test_all_points_equal() -> None:
    result = ops.rerank(torch.ones(2, 3), torch.ones(40, 3))
    assert result.isfinite().all()
    distances, indices = ops.rerank(torch.ones(2, 3), torch.ones(4, 3), top=3)
    assert indices.tolist() == [[0, 1, 2]] * 2
    assert (distances < 1e-6).all()


def test_one_query_and_one_gallery_row() -> None:
    assert ops.rerank(torch.ones(1, 3), torch.full((1, 3), 2.0), lambda_value=1.0).tolist() == [[1.0]]


def test_lambda_one_is_the_original_distance(pair) -> None:
    points = torch.cat(pair)
    _, _, row_max = ops.nearest(points, points, 1)
    expected = ops.pairwise_distance(*pair) / row_max[:6, None]
    assert torch.equal(ops.rerank(*pair, lambda_value=1.0), expected)


def test_k2_of_one_averages_nothing(pair) -> None:
    encoding = ops.encode(*pair, k1=4, k2=1)
    points = torch.cat(pair)
    _, neighbours, row_max = ops.nearest(points, points, 5)
    indptr, indices = ops.k_reciprocal(neighbours, 4)
    assert torch.equal(encoding.values, ops.reciprocal_weights(points, row_max, indptr, indices))
    assert torch.equal(encoding.row_max, row_max)


def test_progress(pair) -> None:
    calls: list[tuple[str, int, int]] = []
    told = ops.rerank(*pair, progress=lambda *call: calls.append(call))
    assert torch.equal(told, ops.rerank(*pair))
    assert [call[0] for call in calls if call[1] == 0] == ["neighbours", "encoding", "distances"]
    for stage in ("neighbours", "encoding", "distances"):
        last = [call for call in calls if call[0] == stage][-1]
        assert last[1] == last[2]


@pytest.mark.parametrize("top", [None, 30])
def test_number_of_threads_does_not_matter(top: int | None) -> None:
    """On sets of several blocks of rows and of queries."""
    points = torch.nn.functional.normalize(torch.randn(150, 40)[torch.randint(150, (1500,))] + torch.randn(1500, 40))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            result = ops.rerank(points[:200], points[200:], top=top, progress=lambda *_: None)
            results.append(result if top else (result,))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_no_gradient_and_any_layout(pair) -> None:
    query, gallery = (points.t().contiguous().t().requires_grad_() for points in pair)
    result = ops.rerank(query, gallery)
    assert not result.requires_grad
    assert torch.equal(result, ops.rerank(*pair))


def test_set_beyond_31_bits() -> None:
    """47,000 x 47,000 pairs do not fit in 31 bits; sampled rows against a search of their own."""
    points = torch.randn(47_000, 3)
    distances, indices, row_max = ops.nearest(points, points, 3)
    sample = torch.tensor([0, 1, 23_000, 46_341, 46_999])
    expected = native.knn(points[sample], points.clone(), 3)
    for ours, theirs in zip((distances, indices, row_max), expected, strict=True):
        assert torch.equal(ours[sample], theirs)
    indptr, indices = ops.k_reciprocal(indices, 2)
    assert len(indices) == indptr[-1]
    assert indices.max() == 46_999


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k1": 0}, ConfigError, "k1=0 must be 1 or more"),
        ({"k2": 0}, ConfigError, "k2=0 must be 1 or more"),
        ({"lambda_value": -0.1}, ConfigError, r"lambda=-0.1 is not in \[0, 1\]"),
        ({"lambda_value": 1.5}, ConfigError, r"lambda=1.5 is not in \[0, 1\]"),
        ({"lambda_value": math.nan}, ConfigError, r"lambda=nan is not in \[0, 1\]"),
        ({"top": 0}, ConfigError, "top=0 must be 1 or more"),
        ({"query": torch.zeros(0, 8)}, DataError, "the query has no rows"),
        ({"gallery": torch.zeros(0, 8)}, DataError, "the gallery has no rows"),
        ({"gallery": torch.ones(3, 7)}, ValueError, r"got \[6, 8\] and \[3, 7\]"),
        ({"gallery": torch.ones(3, 8).double()}, ValueError, "Convert with .float"),
        ({"query": torch.tensor([[1.0] * 8, [math.nan] * 8])}, DataError, "row 1 of the query features holds NaN"),
        ({"gallery": torch.full((1, 8), math.inf)}, DataError, "row 0 of the gallery features holds NaN or inf"),
        ({"gallery": torch.eye(10, 8)}, DataError, r"row 8 of the gallery features is zero \(2 such rows\)"),
        ({"gallery": torch.full((2, 8), 3e37)}, DataError, "overflow float32. Normalise the features"),
    ],
)
def test_bad_input(pair, change: dict, error: type[Exception], message: str) -> None:
    arguments = {"query": pair[0], "gallery": pair[1], **change}
    with pytest.raises(error, match=message):
        ops.rerank(**arguments)


def test_stages_check_their_arguments(pair) -> None:
    points = torch.cat(pair)
    _, neighbours, row_max = ops.nearest(points, points, 5)
    indptr, indices = ops.k_reciprocal(neighbours, 4)
    values = ops.reciprocal_weights(points, row_max, indptr, indices)
    outside = neighbours.clone()
    outside[3, 2] = 30
    falling = indptr.clone()
    falling[2] = 0
    wrong = {
        "neighbours hold 0 to 30, expected 0 to 29": lambda: ops.k_reciprocal(outside, 4),
        "30 points cannot have 31 neighbours": lambda: ops.k_reciprocal(torch.zeros(30, 31, dtype=torch.int64), 4),
        r"needs neighbours \[N, K\] int64": lambda: ops.k_reciprocal(neighbours.int(), 4),
        r"needs row_max \[30\]": lambda: ops.reciprocal_weights(points, row_max[:5], indptr, indices),
        r"needs indptr \[31\]": lambda: ops.reciprocal_weights(points, row_max, indptr[:5], indices),
        r"needs features \[N, D\]": lambda: ops.reciprocal_weights(points.double(), row_max, indptr, indices),
        "indptr must rise": lambda: ops.reciprocal_weights(points, row_max, falling, indices),
        "indices hold": lambda: ops.jaccard(indptr, indices + 9, values, 6),
        "needs indices": lambda: ops.jaccard(indptr, indices.int(), values, 6),
        "needs values": lambda: ops.jaccard(indptr, indices, values[:3], 6),
        "num_query=31 must be from 0 to the 30 rows": lambda: ops.jaccard(indptr, indices, values, 31),
        "k2=9 of 30 points, but only 5": lambda: ops.query_expansion(indptr, indices, values, neighbours, 9),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ConfigError, match="k1=0"):
        ops.k_reciprocal(neighbours, 0)
    encoding = ops.encode(*pair)
    with pytest.raises(ValueError, match="but 30 points were encoded"):
        ops.rerank_block(pair[0][:5], pair[1], encoding, 0.3, 0, 5)
    with pytest.raises(ValueError, match="queries 3 to 7 of 6"):
        ops.rerank_block(*pair, encoding, 0.3, 3, 7)
    with pytest.raises(ConfigError, match="top=0"):
        ops.rerank_block_lists(*pair, encoding, 0.3, 0, 6, 0)


def test_rank_counts_small_example() -> None:
    distances = torch.tensor([[0.1, 0.2, 0.2, 0.4], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]])
    g_pids, g_camids = torch.tensor([1, 2, 1, 1]), torch.tensor([0, 1, 1, 1])
    scores = ops.rank_counts(distances, torch.tensor([1, 3, 2]), g_pids, torch.tensor([0, 0, 1]), g_camids)
    # Query 0: entry 0 is junk; then entry 1 at rank 1 and the matches at 2 and 3.
    assert scores[0].tolist() == [(1 / 2 + 2 / 3) / 2, 0.0, 0.0]
    assert scores[1].tolist() == [2 / 3, 0.0, 0.0]
    assert scores[2].tolist() == [2, 0, 0]
    assert scores[3].tolist() == [2, 0, 0]


def test_rank_counts_bad_input() -> None:
    distances = torch.rand(3, 4)
    labels = (torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"needs g_pids \[4\] int64"):
        ops.rank_counts(distances, labels[0], labels[0], *labels)
    with pytest.raises(ValueError, match=r"needs q_camids \[3\] int64"):
        ops.rank_counts(distances, *labels, labels[0].int(), labels[1])
    with pytest.raises(ValueError, match=r"needs distances \[Q, G\] float32"):
        ops.rank_counts(distances.double(), *labels, *labels)
    distances[2, 1] = math.nan
    with pytest.raises(DataError, match="distances of query 2 hold NaN"):
        ops.rank_counts(distances, *labels, *labels)


def test_operators_check_too(pair) -> None:
    """Callers of torch.ops.personvit get an error, not memory that is not theirs."""
    native_ops = torch.ops.personvit
    encoding = ops.encode(*pair)
    row_max, indptr, indices, values, offsets, rows, weights = encoding
    wild, wild_rows = indices.clone(), rows.clone()
    wild[0], wild_rows[0] = 999, 24
    final = (*pair, row_max[:6], indptr[:7])
    index = (values, offsets, rows, weights)
    wrong = {
        "neighbours holds 30": lambda: native_ops.k_reciprocal(torch.full((30, 2), 30), 4),
        "k1=0": lambda: native_ops.k_reciprocal(torch.zeros(30, 2, dtype=torch.int64), 0),
        "must ascend": lambda: native_ops.jaccard(indptr[:7], wild, *index, 24),
        "indptr falls": lambda: native_ops.jaccard(indptr[:7].flip(0), indices, *index, 24),
        "gallery row 23 of 23": lambda: native_ops.jaccard(indptr[:7], indices, *index, 23),
        "inverted_index: num_query=-1": lambda: native_ops.inverted_index(indptr, indices, values, -1),
        "reciprocal_weights: the columns": lambda: native_ops.reciprocal_weights(
            torch.cat(pair), row_max, indptr, wild
        ),
        "query_expansion: neighbours holds": lambda: native_ops.query_expansion(
            indptr, indices, values, torch.full((30, 2), -1), 2
        ),
        "gallery row 24 of 24": lambda: native_ops.rerank_matrix(
            *final, indices, values, offsets, wild_rows, weights, 0.3
        ),
        "lambda_value=2": lambda: native_ops.rerank_matrix(*final, indices, values, offsets, rows, weights, 2.0),
        "top=25": lambda: native_ops.rerank_lists(*final, indices, values, offsets, rows, weights, 0.3, 25),
        "rank_counts: labels": lambda: native_ops.rank_counts(torch.rand(2, 3), *[torch.zeros(3).long()] * 4),
    }
    for message, call in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            call()


def test_opcheck(pair) -> None:
    points = torch.cat(pair)
    _, neighbours, row_max = ops.nearest(points, points, 5)
    indptr, indices = ops.k_reciprocal(neighbours, 4)
    values = ops.reciprocal_weights(points, row_max, indptr, indices)
    index = native.inverted_index(indptr, indices, values, 6)
    final = (*pair, row_max[:6], indptr[:7], indices, values, *index, 0.3)
    labels = (torch.randint(0, 3, (6,)), torch.randint(0, 3, (24,)))
    for name, arguments in {
        "k_reciprocal": (neighbours, 4),
        "reciprocal_weights": (points, row_max, indptr, indices),
        "query_expansion": (indptr, indices, values, neighbours, 3),
        "inverted_index": (indptr, indices, values, 6),
        "jaccard": (indptr[:7], indices, values, *index, 24),
        "rerank_matrix": final,
        "rerank_lists": (*final, 4),
        "rank_counts": (torch.rand(6, 24), *labels, *labels),
        "knn_begin": (points, 3),
    }.items():
        operator = getattr(torch.ops.personvit, name).default
        if name == "knn_begin":  # its heaps hold NaN until something is found
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        else:
            torch.library.opcheck(operator, arguments)
