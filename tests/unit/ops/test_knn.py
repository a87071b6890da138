from __future__ import annotations

import math

import pytest
import torch

from personvit import ops
from personvit.ops import native, neighbours


def test_small_example() -> None:
    gallery = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    distances, indices = ops.knn(torch.tensor([[0.0, 0.0], [3.0, 3.0]]), gallery, k=3)
    assert indices.tolist() == [[0, 2, 1], [1, 2, 0]]
    assert distances.tolist() == [[0.0, 1.0, 25.0], [1.0, 13.0, 18.0]]
    assert distances.dtype == torch.float32
    assert indices.dtype == torch.int64


def test_ties_by_the_lower_index() -> None:
    row = torch.randn(1, 20)
    gallery = row.repeat(100, 1)
    gallery[::7] += 1.0
    _, indices = ops.knn(row, gallery, k=100)
    near = [i for i in range(100) if i % 7]
    assert indices[0].tolist() == near + list(range(0, 100, 7))


def test_equal_rows_have_distance_zero() -> None:
    features = torch.nn.functional.normalize(torch.randn(50, 384), dim=1)
    distances, indices = ops.knn(features, features, k=1)
    assert (distances == 0).all()
    assert indices[:, 0].tolist() == list(range(50))


def test_not_a_number_comes_last() -> None:
    gallery = torch.tensor([[math.nan], [math.inf], [2.0], [math.nan], [1.0]])
    distances, indices = ops.knn(torch.zeros(1, 1), gallery, k=5)
    assert indices[0].tolist() == [4, 2, 1, 0, 3]
    assert distances[0, 3:].isnan().all()
    _, indices = ops.knn(torch.full((1, 1), math.nan), gallery, k=3)
    assert indices[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("queries", "features"), [(0, 5), (3, 0), (0, 0)])
def test_empty(queries: int, features: int) -> None:
    distances, indices = ops.knn(torch.randn(queries, features), torch.randn(4, features), k=2)
    assert distances.shape == indices.shape == (queries, 2)
    assert (indices == torch.tensor([0, 1])).all() if features == 0 else True


def test_number_of_threads_and_company_do_not_matter() -> None:
    query, gallery = torch.randn(200, 33), torch.randn(500, 33)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        distances, indices = ops.knn(query, gallery, k=9)
        itself = ops.nearest(gallery, gallery, k=9)
        torch.set_num_threads(8)
        assert all(torch.equal(a, b) for a, b in zip(ops.nearest(gallery, gallery, k=9), itself, strict=True))
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(ops.nearest(gallery, gallery, k=9), itself, strict=True))
        for part in (slice(0, 1), slice(1, 66), slice(66, 200)):
            alone = ops.knn(query[part], gallery, k=9)
            assert torch.equal(alone[0], distances[part])
            assert torch.equal(alone[1], indices[part])
    finally:
        torch.set_num_threads(threads)


def test_row_maximum() -> None:
    gallery = torch.tensor([[0.0, 0.0], [3.0, 4.0], [math.nan, 0.0]])
    _, _, row_max = ops.nearest(torch.tensor([[0.0, 0.0], [3.0, 3.0], [math.nan, 1.0]]), gallery, k=1)
    assert row_max.tolist() == [25.0, 18.0, 0.0]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_progress_changes_nothing(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(neighbours, "_STEP", 600 * 600)
    query, gallery = torch.randn(70, 5), torch.randn(600, 5)
    ops.set_backend(backend)
    try:
        for left, right in ((query, gallery), (query[:0], gallery), (gallery, gallery)):
            calls: list[tuple[int, int]] = []
            stepwise = ops.nearest(left, right, 6, progress=lambda *call, calls=calls: calls.append(call))
            assert all(torch.equal(a, b) for a, b in zip(stepwise, ops.nearest(left, right, 6), strict=True))
            assert calls == [(step, calls[-1][1]) for step in range(1, calls[-1][1] + 1)]
        assert len(calls) == 5
    finally:
        ops.set_backend("auto")


def test_non_contiguous() -> None:
    query, gallery = torch.randn(12, 10).T, torch.randn(12, 40).T
    a, b = ops.knn(query, gallery, k=4), ops.knn(query.contiguous(), gallery.contiguous(), k=4)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_no_gradient_is_recorded() -> None:
    distances, _ = ops.knn(torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), k=2)
    assert not distances.requires_grad


@pytest.mark.parametrize(
    ("query", "gallery", "k", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 3), 0, "k=0 must be from 1 to the 4 rows"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 5, "k=5 must be from 1 to the 4 rows"),
        (torch.zeros(2, 3), torch.zeros(4, 2), 1, r"got \[2, 3\] and \[4, 2\]"),
        (torch.zeros(3), torch.zeros(4, 3), 1, r"got \[3\]"),
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(4, 3), 1, "Convert with .float"),
        (torch.zeros(2, 3), torch.zeros(4, 3, device="meta"), 1, "query lies on cpu, gallery on meta"),
    ],
)
def test_arguments_are_checked(query: torch.Tensor, gallery: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.knn(query, gallery, k)


def test_operator_checks_too() -> None:
    assert native.load_cpu() is None
    with pytest.raises(RuntimeError, match="k=9 must be from 1 to the gallery's size 4"):
        torch.ops.personvit.knn(torch.zeros(2, 3), torch.zeros(4, 3), 9)
    with pytest.raises(RuntimeError, match="query has 3 features, gallery 2"):
        torch.ops.personvit.knn(torch.zeros(2, 3), torch.zeros(4, 2), 1)


def test_steps_must_fit() -> None:
    features = torch.randn(50, 4)
    state = torch.ops.personvit.knn_begin(features, 3)
    for wrong in (torch.randn(49, 4), torch.randn(50, 5)):
        with pytest.raises(RuntimeError, match="knn_step"):
            torch.ops.personvit.knn_step(wrong, *state, 0, 1)
    with pytest.raises(RuntimeError, match="knn_step: step 2 of 2"):
        torch.ops.personvit.knn_step(features, *state, 2, 2)


def test_opcheck() -> None:
    assert native.load_cpu() is None
    torch.library.opcheck(torch.ops.personvit.pairwise_distance.default, (torch.randn(3, 4), torch.randn(6, 4)))
    torch.library.opcheck(torch.ops.personvit.knn.default, (torch.randn(3, 4), torch.randn(6, 4), 2))
