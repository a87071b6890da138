from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from personvit.errors import ConfigError, DataError
from personvit.retrieval import RerankParameters, pairwise_distance, rerank, reranked_blocks
from personvit.retrieval.rerank import RankedLists, first_ranks

module = importlib.import_module("personvit.retrieval.rerank")


def clusters(ids, images, seed=0, dim=24, noise=0.7):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(ids, dim, generator=generator).repeat_interleave(images, dim=0)
    return F.normalize(centres + noise * torch.randn(centres.shape, generator=generator), dim=1)


@pytest.fixture
def sets():
    features = clusters(20, 9)
    return features[::9].contiguous(), features[torch.arange(len(features)) % 9 != 0].contiguous()  # 20, 160


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("values", [(20, 6, 0.3), (50, 15, 0.3), (5, 1, 1.0)])
def test_blocks_are_the_matrix(monkeypatch, sets, block, values):
    in_one = torch.cat(list(reranked_blocks(*sets, RerankParameters(*values))))
    monkeypatch.setattr(module, "_BLOCK", block)
    blocks = list(reranked_blocks(*sets, RerankParameters(*values)))
    assert [len(part) for part in blocks[:-1]] == [block] * (len(blocks) - 1)
    assert torch.equal(torch.cat(blocks), in_one)  # whatever the block, a query has the same bits
    assert torch.equal(in_one, rerank(*sets, *values))


@pytest.mark.parametrize("top", [1, 10, 160, 1000])
def test_lists_are_the_best_of_the_matrix(sets, top):
    whole = rerank(*sets)
    lists = rerank(*sets, top=top)
    assert isinstance(lists, RankedLists)
    ordered = whole.sort(dim=1, stable=True)
    assert torch.equal(lists.indices, ordered.indices[:, :top])
    assert torch.equal(lists.distances, ordered.values[:, :top])


def test_brings_images_of_an_identity_together(sets):
    query, gallery = sets
    same = torch.arange(20)[:, None] == torch.arange(160)[None] // 8

    def matches_among_first_8(distances):
        return same.gather(1, distances.argsort(dim=1)[:, :8]).float().mean()

    assert matches_among_first_8(rerank(query, gallery, 8, 3)) > matches_among_first_8(pairwise_distance(*sets))


def test_lambda_one_is_the_normalised_distance(sets):
    query, gallery = sets
    everything = pairwise_distance(query, torch.cat(sets))
    expected = pairwise_distance(query, gallery) / everything.max(dim=1, keepdim=True).values
    torch.testing.assert_close(rerank(*sets, lambda_value=1.0), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (20, 6), (50, 15), (179, 180), (5000, 5000)])
def test_jaccard_distance_lies_between_0_and_1(sets, k1, k2):
    result = rerank(*sets, k1, k2, 0.0)
    assert result.min() >= 0
    assert result.max() <= 1


def test_few_images_and_large_neighbourhoods():
    features = clusters(3, 2)
    result = rerank(features[:1], features[1:2], k1=50, k2=15)
    assert result.shape == (1, 1)
    assert torch.isfinite(rerank(features[:2], features[2:], k1=50, k2=15)).all()


def test_a_copy_of_the_query_comes_first(sets):
    query, gallery = sets
    gallery = torch.cat([gallery, query])
    assert torch.equal(rerank(query, gallery, top=1).indices[:, 0], torch.arange(160, 180))


def test_order_of_the_gallery_is_irrelevant(sets):
    query, gallery = sets
    order = torch.randperm(len(gallery))
    torch.testing.assert_close(rerank(query, gallery[order]), rerank(query, gallery)[:, order], atol=1e-6, rtol=0)


def test_copies_everywhere_do_not_break_it():
    features = torch.eye(4).repeat_interleave(30, dim=0)  # more copies than neighbours: an image may miss itself
    result = rerank(features[:7], features[7:], 5, 2)
    assert torch.isfinite(result).all()


def test_inputs_stay_as_they_are(sets):
    copies = [part.clone() for part in sets]
    rerank(*sets)
    assert all(torch.equal(part, copy) for part, copy in zip(sets, copies, strict=True))


def test_ties_of_lists_are_ordered_by_index():
    lists = first_ranks(torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]), 3)
    assert lists.indices.tolist() == [[4, 1, 2]]
    assert lists.distances.tolist() == [[0.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k1": 0}, "k1=0: expected a whole number"),
        ({"k2": 0}, "k2=0.*rerank.k2=VALUE"),
        ({"k1": 2.5}, "k1=2.5"),
        ({"lambda_value": -0.1}, "lambda_value=-0.1: expected a share from 0"),
        ({"lambda_value": 1.1}, "lambda_value=1.1"),
        ({"lambda_value": np.nan}, "lambda_value=nan"),
        ({"top": 0}, "top=0"),
    ],
)
def test_parameters_are_checked(sets, arguments, message):
    with pytest.raises(ConfigError, match=message):
        rerank(*sets, **arguments)


def test_features_are_checked(sets):
    query, gallery = sets
    with pytest.raises(DataError, match="NaN"):
        rerank(query * torch.nan, gallery)
    with pytest.raises(DataError, match="only zeros"):
        rerank(query, gallery * 0)


def test_too_little_memory_for_the_matrix_offers_lists(monkeypatch, sets):
    free = 20 * 160 * 4  # the matrix alone would fit
    monkeypatch.setattr(module, "available_memory", lambda device: free)
    with pytest.raises(
        ConfigError, match=r"20 queries x 160 gallery images takes .* free on cpu.*rerank\(\.\.\., top=100\)"
    ):
        rerank(*sets)
    assert rerank(*sets, top=3).indices.shape == (20, 3)


def test_presets_have_names():
    assert RerankParameters().preset == "zhong2017"
    assert str(RerankParameters(50, 15, 0.3)) == "k1=50 k2=15 lambda=0.3 (personvit)"
    assert RerankParameters(20, 6, 0.4).preset is None
