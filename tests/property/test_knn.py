from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personvit import ops


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    queries, rows, features = draw(st.integers(1, 70)), draw(st.integers(1, 80)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.sampled_from([2, 3, 1000]))  # few levels: many ties
    query = torch.randint(0, levels, (queries, features), generator=generator).float()
    gallery = torch.randint(0, levels, (rows, features), generator=generator).float()
    return query, gallery, draw(st.integers(1, rows))


@settings(max_examples=100, deadline=None)
@given(problems())
def test_is_a_stable_sort_of_all_distances(problem: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    query, gallery, k = problem
    distances, indices = ops.knn(query, gallery, k)
    # Integers: exact in float32 and float64 alike.
    expected = (query.double()[:, None] - gallery.double()[None]).square().sum(2).sort(dim=1, stable=True)
    assert torch.equal(indices, expected.indices[:, :k])
    assert torch.equal(distances.double(), expected.values[:, :k])


@settings(max_examples=50, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_permuted_gallery_gives_permuted_indices(problem: tuple[torch.Tensor, torch.Tensor, int], random) -> None:
    query, gallery, k = problem
    order = torch.tensor(random.sample(range(len(gallery)), len(gallery)))
    distances, indices = ops.knn(query, gallery, k)
    shuffled_distances, shuffled_indices = ops.knn(query, gallery[order], k)
    assert torch.equal(shuffled_distances, distances)
    reached = (query[:, None] - gallery[order][shuffled_indices]).square().sum(2)
    torch.testing.assert_close(reached, shuffled_distances)
    assert indices.max() < len(gallery)
