from __future__ import annotations

import numpy as np
import pytest
import torch

from personvit.config import FinetuneOptimConfig
from personvit.models import ReIDModel, VisionTransformer, vit_small
from personvit.optim import build_finetune_optimizer, finetune_groups, finetune_lr


@pytest.fixture
def model():
    base = VisionTransformer((32, 16), embed_dim=16, depth=1, num_heads=2, num_cameras=3)
    return ReIDModel(base, 5)


def test_groups_follow_the_names(model):
    cfg = FinetuneOptimConfig(lr=0.5, bias_lr_factor=3.0, weight_decay=0.1, weight_decay_bias=0.2)
    weights, biases = finetune_groups(model, cfg)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    left, right = ({name_of[id(parameter)] for parameter in group["params"]} for group in (weights, biases))
    trained = {name for name in name_of.values() if name != "bottleneck.bias"}  # frozen
    assert right == {name for name in trained if name.endswith(".bias")}
    assert left == trained - right
    assert {"base.cls_token", "base.pos_embed", "base.sie_embed", "base.norm.weight", "classifier.weight"} <= left
    assert (weights["lr"], biases["lr"]) == (0.5, 1.5)
    assert (weights["weight_decay"], biases["weight_decay"]) == (0.1, 0.2)


def test_counts_are_the_published_ones():
    with torch.device("meta"):
        weights, biases = finetune_groups(ReIDModel(vit_small(), 1041), FinetuneOptimConfig())
    # published: 154 tensors, 75 of them biases; the unused base.fc is one of either
    assert (len(weights["params"]), len(biases["params"])) == (78, 74)


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizers(model, name, kind):
    optimizer = build_finetune_optimizer(model, FinetuneOptimConfig(name=name, lr=0.1, momentum=0.8))
    assert type(optimizer) is kind
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    group = optimizer.param_groups[0]
    if name == "sgd":
        assert (group["momentum"], group["dampening"], group["nesterov"]) == (0.8, 0, False)
    else:
        assert group["betas"] == (0.9, 0.999)


def test_two_sgd_steps_by_hand(model):
    cfg = FinetuneOptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01, weight_decay_bias=0.02)
    optimizer = build_finetune_optimizer(model, cfg)
    watched = {"classifier.weight": (0.1, 0.01), "base.norm.bias": (0.2, 0.02)}
    parameters = dict(model.named_parameters())
    values = {name: parameters[name].detach().clone() for name in watched}
    velocities = {name: torch.zeros_like(value) for name, value in values.items()}
    for _ in range(2):
        for name, (lr, decay) in watched.items():
            gradient = torch.randn_like(values[name])
            parameters[name].grad = gradient
            velocities[name] = 0.9 * velocities[name] + gradient + decay * values[name]
            values[name] = values[name] - lr * velocities[name]
        optimizer.step()
    for name, value in values.items():
        torch.testing.assert_close(parameters[name].detach(), value)


def test_published_rates():
    rates = finetune_lr(FinetuneOptimConfig(), 120)
    assert rates.shape == (120, 2)
    assert rates.dtype == np.float64
    used = rates[[0, 19, 20, 60, 119], 0]
    np.testing.assert_allclose(used, [4.0e-6, 3.802e-4, 3.7326e-4, 2.004e-4, 8.684e-7], rtol=2e-4)
    assert rates[:, 0].argmax() == 19  # the last epoch of the warm-up: the rate drops after it
    assert rates[:, 0].max() < 4e-4
    assert rates[0, 1] == rates[0, 0]  # both groups start at the same rate
    assert rates[60, 1] == pytest.approx(2 * rates[60, 0], rel=5e-3)


@pytest.mark.parametrize(("warmup", "epochs"), [(0, 3), (5, 3), (3, 3), (0, 1), (0, 0)])
def test_any_length_has_one_row_per_epoch(warmup, epochs):
    rates = finetune_lr(FinetuneOptimConfig(warmup_epochs=warmup), epochs)
    assert rates.shape == (epochs, 2)
    assert np.isfinite(rates).all()
    if not warmup and epochs:
        np.testing.assert_allclose(rates[0], [4e-4, 8e-4])
