"""Losses and learning rates of the fine-tuning against values of the published code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from personvit.config import FinetuneOptimConfig
from personvit.losses import IdentityLoss, TripletLoss, hardest_pairs
from personvit.optim import finetune_lr

CASES = range(4)
MARGINS = {"soft": None, "margin03": 0.3, "soft_l2": None}


@pytest.mark.parametrize("tag", MARGINS)
@pytest.mark.parametrize("case", CASES)
def test_triplets_equal_the_published_code(golden, case, tag):
    values = golden("triplet")
    features = torch.from_numpy(values[f"feat_{case}"]).requires_grad_()
    labels = torch.from_numpy(values[f"label_{case}"])
    # normalize_feature of the published code; it divides by norm + 1e-12 there
    given = F.normalize(features) if tag == "soft_l2" else features
    pairs = hardest_pairs(given, labels)
    torch.testing.assert_close(pairs.positive, torch.from_numpy(values[f"{tag}_ap_{case}"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pairs.negative, torch.from_numpy(values[f"{tag}_an_{case}"]), rtol=1e-5, atol=1e-6)
    loss = TripletLoss(MARGINS[tag])(given, labels)
    loss.backward()
    np.testing.assert_allclose(loss.item(), values[f"{tag}_loss_{case}"], rtol=1e-5)
    if f"{tag}_grad_{case}" in values:
        expected = torch.from_numpy(values[f"{tag}_grad_{case}"])
        torch.testing.assert_close(features.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_hardest_images_equal_the_published_code(golden, case):
    values = golden("triplet")
    pairs = hardest_pairs(torch.from_numpy(values[f"feat_{case}"]), torch.from_numpy(values[f"label_{case}"]))
    np.testing.assert_array_equal(pairs.positive_index.numpy(), values[f"p_inds_{case}"])
    np.testing.assert_array_equal(pairs.negative_index.numpy(), values[f"n_inds_{case}"])


@pytest.mark.parametrize(("key", "smoothing"), [("ce", 0.0), ("ce_ls01", 0.1), ("ce_ls01_timm", 0.1)])
def test_cross_entropy_equals_the_published_code(golden, key, smoothing):
    values = golden("triplet")
    logits, labels = torch.from_numpy(values["ce_score"]), torch.from_numpy(values["ce_target"])
    np.testing.assert_allclose(IdentityLoss(smoothing)(logits, labels).item(), values[key], rtol=1e-5)


@pytest.mark.parametrize("tag", ["small", "base8e3", "short", "base8e3_wu5", "market_base_shell"])
def test_rates_equal_the_published_scheduler(golden, tag):
    values = golden("lr_schedule")
    lr, epochs, warmup = values[f"{tag}_params"]
    assert values[f"{tag}_used"].shape == (epochs, 2)
    rates = finetune_lr(FinetuneOptimConfig(lr=float(lr), warmup_epochs=int(warmup)), int(epochs))
    np.testing.assert_allclose(rates, values[f"{tag}_used"], rtol=1e-9, atol=0)
