"""Laws of re-ranking, and the dense numpy reference as oracle."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from helpers.rerank_numpy import rerank_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from personvit.retrieval import rerank


@st.composite
def problems(draw):
    """Clustered unit features of random shape (query, gallery), and parameters that may exceed their number."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    queries, gallery, width = draw(st.integers(1, 12)), draw(st.integers(1, 60)), draw(st.integers(2, 70))
    centres = torch.randn(draw(st.integers(1, 9)), width, generator=generator)
    chosen = torch.randint(len(centres), (queries + gallery,), generator=generator)
    noise = draw(st.sampled_from([0.1, 0.5, 2.0]))
    features = F.normalize(centres[chosen] + noise * torch.randn(len(chosen), width, generator=generator), dim=1)
    values = draw(st.tuples(st.integers(1, 90), st.integers(1, 20), st.sampled_from([0.0, 0.3, 1.0])))
    return features[:queries], features[queries:], values


@settings(max_examples=60, deadline=None)
@given(problems())
def test_equals_the_numpy_reference(problem):
    query, gallery, values = problem
    # A product of matrices loses the digits of small distances: the oracle gets exact ones.
    points = torch.cat([query, gallery]).double()
    distances = (points[:, None] - points[None]).square().sum(dim=2)
    distances = (distances / distances.amax(dim=1, keepdim=True)).float().numpy()
    wanted = rerank_numpy(query.numpy(), gallery.numpy(), *values, distances=distances)
    difference = np.abs(rerank(query, gallery, *values).numpy() - wanted)
    # Two distances that differ by rounding only may change places and move a few rows by a weight.
    assert np.quantile(difference, 0.9) < 3e-6


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(0, 2**31))
def test_permuting_the_gallery_permutes_the_result(problem, seed):
    query, gallery, values = problem
    order = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(seed))
    result = rerank(query, gallery, *values)
    torch.testing.assert_close(rerank(query, gallery[order], *values), result[:, order], rtol=0, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_distances_lie_between_0_and_1(problem):
    query, gallery, values = problem
    result = rerank(query, gallery, *values)
    assert result.shape == (len(query), len(gallery))
    assert result.min() >= 0
    assert result.max() <= 1


@settings(max_examples=40, deadline=None)
@given(problems(), st.data())
def test_a_query_finds_its_own_image_first(problem, data):
    query, gallery, (k1, k2, _) = problem
    place = data.draw(st.integers(0, len(gallery)))
    gallery = torch.cat([gallery[:place], query[:1], gallery[place:]])
    lists = rerank(query, gallery, k1, k2, 0.3, top=1)
    assert lists.indices[0, 0] == place


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(1, 70))
def test_lists_are_the_first_of_the_matrix(problem, top):
    query, gallery, values = problem
    ordered = rerank(query, gallery, *values).sort(dim=1, stable=True)
    lists = rerank(query, gallery, *values, top=top)
    assert torch.equal(lists.indices, ordered.indices[:, :top])
    assert torch.equal(lists.distances, ordered.values[:, :top])
