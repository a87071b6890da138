"""A whole step of the fine-tuning against one written out with primitive operations, in float64; the ViT against timm.

The restatement shares no code with the package: it sees a dictionary of tensors, images and labels.
"""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor

from personvit.config import FinetuneOptimConfig
from personvit.losses import IdentityLoss, TripletLoss
from personvit.models import ReIDModel, VisionTransformer, vit_small
from personvit.optim import build_finetune_optimizer, finetune_lr

HEADS, DEPTH, SIZE, PATCH = 2, 3, (64, 32), 16
IDS = 6


def _linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _layer_norm(x, w, name):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _attention(x, w, name):
    heads = []
    for part in _linear(x, w, f"{name}.qkv").chunk(3, dim=-1):  # q, k, v
        heads.append(part.unflatten(-1, (HEADS, -1)).transpose(1, 2))  # [B, H, N, Dh]
    q, k, v = heads
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).exp()
    mixed = (scores / scores.sum(-1, keepdim=True)) @ v
    return _linear(mixed.transpose(1, 2).flatten(2), w, f"{name}.proj")


def _gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _cls_token(w, images, camids):
    cells = images.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH))  # [B, 3, rows, P, columns, P]
    patches = torch.einsum("bcypxq,dcpq->byxd", cells, w["base.patch_embed.proj.weight"]).flatten(1, 2)
    patches = patches + w["base.patch_embed.proj.bias"]
    x = torch.cat([w["base.cls_token"].expand(len(images), -1, -1), patches], dim=1) + w["base.pos_embed"]
    if camids is not None:
        x = x + 3.0 * w["base.sie_embed"][camids]
    for number in range(DEPTH):
        block = f"base.blocks.{number}"
        x = x + _attention(_layer_norm(x, w, f"{block}.norm1"), w, f"{block}.attn")
        hidden = _gelu(_linear(_layer_norm(x, w, f"{block}.norm2"), w, f"{block}.mlp.fc1"))
        x = x + _linear(hidden, w, f"{block}.mlp.fc2")
    return _layer_norm(x, w, "base.norm")[:, 0]


def _loss(w, images, labels, camids, margin):
    features = _cls_token(w, images, camids)
    mean, variance = features.mean(0), features.var(0, correction=0)
    normed = (features - mean) / (variance + 1e-5).sqrt() * w["bottleneck.weight"]
    logits = normed @ w["classifier.weight"].T
    identity = sum(row.logsumexp(0) - row[label] for row, label in zip(logits, labels, strict=True)) / len(labels)
    triplets = []
    for anchor, own in zip(features, labels, strict=True):
        distances = [(anchor - other).square().sum().clamp(min=1e-12).sqrt() for other in features]
        positive = max((d for d, pid in zip(distances, labels, strict=True) if pid == own), key=Tensor.item)
        negative = min((d for d, pid in zip(distances, labels, strict=True) if pid != own), key=Tensor.item)
        gap = positive - negative
        triplets.append((1 + gap.exp()).log() if margin is None else (gap + margin).clamp(min=0))
    return identity + sum(triplets) / len(triplets), mean, variance


@pytest.mark.parametrize(("cameras", "margin"), [(0, None), (3, None), (0, 0.3)])
def test_steps_equal_the_restatement(cameras, margin):
    """Losses and all gradients of two steps, and the weights that SGD makes of them."""
    base = VisionTransformer(SIZE, embed_dim=32, depth=DEPTH, num_heads=HEADS, num_cameras=cameras)
    model = ReIDModel(base, IDS).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases, norms and classifier too: a swapped one shows
            if name != "bottleneck.bias":
                parameter.add_(torch.randn_like(parameter) * 0.1)
    cfg = FinetuneOptimConfig(lr=0.02, warmup_epochs=3, weight_decay=0.01, weight_decay_bias=0.03)
    optimizer, rates = build_finetune_optimizer(model, cfg), finetune_lr(cfg, 5)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    theirs = {name: value.detach().clone() for name, value in model.state_dict().items()}
    velocity = {name: torch.zeros_like(theirs[name]) for name in trained}
    running = [torch.zeros(32, dtype=torch.float64), torch.ones(32, dtype=torch.float64)]

    for step in range(2):
        images = torch.randn(9, 3, *SIZE, dtype=torch.float64)
        labels, camids = torch.tensor([4, 0, 4, 1, 1, 0, 4, 5, 1]), torch.arange(9) % 3
        for group, rate in zip(optimizer.param_groups, rates[step], strict=True):
            group["lr"] = float(rate)
        optimizer.zero_grad()
        logits, features = model(images, camids)
        loss = IdentityLoss()(logits, labels) + TripletLoss(margin)(features, labels)
        loss.backward()
        optimizer.step()

        leaves = {name: theirs[name].requires_grad_() for name in trained}
        told = camids if cameras else None
        expected, mean, variance = _loss({**theirs, **leaves}, images, labels.tolist(), told, margin)
        gradients = dict(zip(trained, torch.autograd.grad(expected, list(leaves.values())), strict=True))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        parameters = dict(model.named_parameters())
        start = 0.01 * 0.02
        for name in trained:
            torch.testing.assert_close(parameters[name].grad, gradients[name], rtol=1e-6, atol=1e-9, msg=name)
            peak, decay = (0.04, 0.03) if "bias" in name else (0.02, 0.01)
            velocity[name] = 0.9 * velocity[name] + gradients[name] + decay * theirs[name].detach()
            theirs[name] = theirs[name].detach() - (start + step * (peak - start) / 3) * velocity[name]
            torch.testing.assert_close(parameters[name].detach(), theirs[name], rtol=1e-6, atol=1e-9, msg=name)
        running = [0.9 * running[0] + 0.1 * mean.detach(), 0.9 * running[1] + 0.1 * variance.detach() * 9 / 8]
        torch.testing.assert_close(model.bottleneck.running_mean, running[0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(model.bottleneck.running_var, running[1], rtol=1e-6, atol=1e-9)
    assert not model.bottleneck.bias.any()


def test_float32_step_is_within_1e_5_of_float64():
    """What single precision leaves of the gradients, against the largest value of all of them.

    Not tensor by tensor: some are exactly 0 (the last norm's bias, which batch norm and distances ignore).
    """
    base = VisionTransformer(SIZE, embed_dim=32, depth=DEPTH, num_heads=HEADS)
    exact = ReIDModel(base, IDS).double()
    single = ReIDModel(VisionTransformer(SIZE, embed_dim=32, depth=DEPTH, num_heads=HEADS), IDS)
    single.load_state_dict(exact.state_dict())
    images, labels = torch.randn(8, 3, *SIZE), torch.arange(4).repeat_interleave(2)
    gradients = []
    for model, given in ((exact, images.double()), (single, images)):
        logits, features = model(given)
        loss = IdentityLoss()(logits, labels) + TripletLoss()(features, labels)
        loss.backward()
        gradients.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@torch.no_grad()
def test_vit_small_equals_timm(dtype, limit):
    """Relative to the largest value of a feature. In float32 either is about 7e-7 away from the exact result."""
    ours = vit_small().eval()
    for parameter in ours.parameters():  # biases and norms too, so that a swapped one shows
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=(256, 128), patch_size=16, embed_dim=384, depth=12, num_heads=6, num_classes=0, global_pool="token"
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 256, 128, dtype=dtype)
    expected = theirs.to(dtype)(images)
    assert (ours.to(dtype).embed(images) - expected).abs().max() <= limit * expected.abs().max()
