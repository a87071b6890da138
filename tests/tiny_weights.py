"""Small models and the files that published code would write of them, by the specification of each layout."""

from __future__ import annotations

import argparse

import torch

from personvit.models import ReIDModel, VisionTransformer

SIZE = (64, 32)
WIDTH = 64


def tiny_vit(**overrides) -> VisionTransformer:
    """Every tensor random, so that a swapped or forgotten one shows."""
    settings = {"img_size": SIZE, "embed_dim": WIDTH, "depth": 2, "num_heads": 1, **overrides}
    return shaken(VisionTransformer(**settings))


def tiny_reid(num_ids=7, neck_feat="before", **overrides) -> ReIDModel:
    model = shaken(ReIDModel(tiny_vit(**overrides), num_ids, neck_feat=neck_feat))
    model.bottleneck.running_mean.normal_()
    model.bottleneck.running_var.uniform_(0.5, 2.0)
    model.bottleneck.num_batches_tracked.fill_(123)
    return model


def shaken(model, by=0.1):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * by)
    return model.eval()


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def pretraining_head():
    """Of iBOT; the two last layers are tied, as with a shared head."""
    names = {"mlp.0.weight": (16, WIDTH), "mlp.0.bias": (16,), "mlp.2.weight": (8, 16), "mlp.2.bias": (8,)}
    tensors = {f"head.{name}": torch.randn(shape) for name, shape in names.items()}
    shared_g, shared_v = torch.ones(32, 1), torch.randn(32, 8)
    for layer in ("last_layer", "last_layer2"):
        tensors |= {f"head.{layer}.weight_g": shared_g, f"head.{layer}.weight_v": shared_v}
    return tensors


def ibot_checkpoint(**overrides):
    """bytedance/ibot main_ibot.py: student with DDP's prefix and mask token, teacher without, a Namespace."""
    teacher, student = tiny_vit(**overrides), tiny_vit(masked_embed=True, **overrides)
    return {
        "student": prefixed(prefixed(student.state_dict(), "backbone.") | pretraining_head(), "module."),
        "teacher": prefixed(teacher.state_dict(), "backbone.") | pretraining_head(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 221,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, lr=5e-4, global_crops_scale=(0.4, 1.0)),
        "ibot_loss": {"center": torch.zeros(1, 4), "center2": torch.zeros(1, 1, 4)},
    }


def transformer_120(num_ids=7, num_cameras=0, **overrides):
    """hustvl/PersonViT transformer_120.pth: the whole module's state dict, with the unused `base.fc`."""
    model = tiny_reid(num_ids, num_cameras=num_cameras, **overrides)
    return {**model.state_dict(), "base.fc.weight": torch.randn(10, WIDTH), "base.fc.bias": torch.randn(10)}


def dinov2(patch_size=14, image=(56, 56)):
    """DINOv2's names: a plain ViT with LayerScale and a mask token."""
    model = tiny_vit(img_size=image, patch_size=patch_size)
    scales = {f"blocks.{i}.ls{j}.gamma": torch.randn(WIDTH) for i in range(2) for j in (1, 2)}
    return {**model.state_dict(), **scales, "mask_token": torch.zeros(1, WIDTH)}


def plain(**overrides):
    """TransReID-SSL's extracted backbone, and timm's with num_classes=0."""
    return tiny_vit(**overrides).state_dict()


def timm_classifier():
    """timm's with a classification head, in half precision."""
    head = {"head.weight": torch.randn(5, WIDTH), "head.bias": torch.randn(5)}
    return {name: value.half() for name, value in {**plain(), **head}.items()}
