from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from personvit.errors import ConfigError, DataError
from personvit.retrieval import expand_queries, pairwise_distance
from personvit.retrieval import expansion as module


def unit(count, seed, dim=16):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator), dim=1)


def by_definition(query, gallery, top, alpha):
    result = []
    for q in query.double().numpy():
        cosine = gallery.double().numpy() @ q
        chosen = np.argsort(-cosine, kind="stable")[:top]
        weights = np.maximum(cosine[chosen], 0) ** alpha if alpha else np.ones(len(chosen))
        mean = q + weights @ gallery.double().numpy()[chosen]
        result.append(mean / np.linalg.norm(mean))
    return np.array(result)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("top", [1, 5, 33, 100])
def test_equals_the_definition(monkeypatch, top, alpha):
    monkeypatch.setattr(module, "_BLOCK", 7)
    query, gallery = unit(19, 0), unit(33, 1)
    result = expand_queries(query, gallery, top, alpha)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, by_definition(query, gallery, top, alpha), atol=2e-6)


def test_worked_example():
    query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    expected = F.normalize(torch.tensor([[1.6, 0.8]]), dim=1)
    torch.testing.assert_close(expand_queries(query, gallery, top=1), expected)


def test_neighbours_come_closer():
    query, gallery = unit(5, 2), unit(40, 3)
    before = pairwise_distance(query, gallery).sort(dim=1).values[:, :3].mean()
    after = pairwise_distance(expand_queries(query, gallery, 3), gallery).sort(dim=1).values[:, :3].mean()
    assert after < before


def test_inputs_stay_as_they_are():
    query, gallery = unit(5, 2), unit(40, 3)
    copies = query.clone(), gallery.clone()
    expand_queries(query, gallery, 3, alpha=2)
    assert torch.equal(query, copies[0])
    assert torch.equal(gallery, copies[1])


@pytest.mark.parametrize(
    ("top", "alpha", "message"),
    [(0, 0.0, "expansion.top=0"), (3, -1.0, "expansion.alpha=-1"), (3, np.nan, "alpha=nan")],
)
def test_parameters_are_checked(top, alpha, message):
    with pytest.raises(ConfigError, match=message):
        expand_queries(unit(2, 0), unit(3, 1), top, alpha)


def test_features_are_checked():
    with pytest.raises(DataError, match="16 dimensions, gallery features 8"):
        expand_queries(unit(2, 0), unit(3, 1, dim=8), 1)
