from __future__ import annotations

import math

import pytest
import torch

from personvit.losses import IdentityLoss, TripletLoss, hardest_pairs


def _by_loops(features, labels):
    """Furthest positive (self included) and nearest negative of every anchor, by exact distances in float64."""
    positive, negative = [], []
    for anchor, own in zip(features.double(), labels, strict=True):
        distances = [(float((anchor - row).norm()), pid) for row, pid in zip(features.double(), labels, strict=True)]
        positive.append(max(distance for distance, pid in distances if pid == own))
        negative.append(min(distance for distance, pid in distances if pid != own))
    return torch.tensor(positive), torch.tensor(negative)


def _batch(labels, width=16):
    return torch.randn(len(labels), width), torch.tensor(labels)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [5, 9, 5, 5, 9, 2], [3, 1], [0] * 7 + [1]])
def test_hardest_pairs_with_unequal_numbers_of_positives(labels):
    features, pids = _batch(labels)
    pairs = hardest_pairs(features, pids)
    positive, negative = _by_loops(features, labels)
    torch.testing.assert_close(pairs.positive, positive, atol=2e-3, rtol=1e-5)  # of self distances: cancellation
    torch.testing.assert_close(pairs.negative, negative, atol=1e-5, rtol=1e-5)
    assert (pids[pairs.positive_index] == pids).all()
    assert (pids[pairs.negative_index] != pids).all()


def test_soft_and_hard_margin():
    features, pids = _batch([0, 0, 1, 1, 2])
    positive, negative = _by_loops(features, pids.tolist())
    soft = sum(math.log1p(math.exp(p - n)) for p, n in zip(positive.tolist(), negative.tolist(), strict=True)) / 5
    hard = sum(max(0.0, p - n + 0.3) for p, n in zip(positive.tolist(), negative.tolist(), strict=True)) / 5
    assert TripletLoss()(features, pids).item() == pytest.approx(soft, rel=1e-3)
    assert TripletLoss(margin=0.3)(features, pids).item() == pytest.approx(hard, rel=1e-3)


def test_far_features_neither_overflow_nor_lose_the_gradient():
    features = torch.tensor([[0.0, 0.0], [500.0, 0.0], [1.0, 0.0], [400.0, 0.0]], requires_grad=True)
    loss = TripletLoss()(features, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx((499 + 400 + 398 + 299) / 4, rel=1e-5)
    assert features.grad.isfinite().all()


def test_equal_features_give_log_two_and_a_finite_gradient():
    features = torch.ones(4, 8, requires_grad=True)
    loss = TripletLoss()(features, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert features.grad.isfinite().all()


def test_one_identity_is_refused_with_the_cause():
    with pytest.raises(ValueError, match=r"4 images of one identity has no negative.*train\.batch_size"):
        TripletLoss()(torch.randn(4, 8), torch.tensor([7, 7, 7, 7]))


def test_distances_are_float32_under_autocast():
    features, pids = _batch([0, 0, 1, 1, 2, 2], width=64)
    close = torch.ones(1, 64) * 3 + features * 1e-2  # bfloat16 would round every distance away
    loss = TripletLoss()(close, pids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = TripletLoss()(close, pids)
    assert torch.equal(inside, loss)
    assert TripletLoss()(features.bfloat16(), pids).dtype == torch.float32
    assert TripletLoss()(features.double(), pids).dtype == torch.float64


def test_smoothed_cross_entropy_is_the_published_formula():
    logits, labels, eps, ids = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 6, 3, 3, 1]), 0.1, 7
    target = torch.full((5, ids), eps / ids, dtype=torch.float64)
    target[torch.arange(5), labels] += 1 - eps
    expected = (-target * logits.log_softmax(1)).mean(0).sum()
    torch.testing.assert_close(IdentityLoss(eps)(logits, labels), expected, rtol=1e-12, atol=0)
    plain = -logits.log_softmax(1)[torch.arange(5), labels].mean()
    torch.testing.assert_close(IdentityLoss()(logits, labels), plain, rtol=1e-12, atol=0)


def test_cross_entropy_of_half_precision_logits_is_float32():
    logits, labels = torch.randn(5, 7).bfloat16(), torch.tensor([0, 6, 3, 3, 1])
    loss = IdentityLoss()(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, IdentityLoss()(logits.float(), labels))
