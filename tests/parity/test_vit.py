"""The backbone against the published iBOT and PersonViT code, and against timm."""

from __future__ import annotations

import pytest
import timm
import torch

from personvit.models import VisionTransformer

TAGS = ("sq", "rect", "tall")


def _weights(values) -> dict[str, torch.Tensor]:
    return {key.removeprefix("w."): torch.from_numpy(values[key]).float() for key in values if key.startswith("w.")}


@pytest.fixture(scope="module")
def ibot(golden):
    values = golden("vit_small_forward")
    weights = _weights(values) | _weights(golden("ibot_vit_forward"))
    model = VisionTransformer((64, 64), embed_dim=96, depth=3, num_heads=3, masked_embed=True).eval()
    model.load_state_dict(weights)
    return model, golden("ibot_vit_forward")


@pytest.mark.parametrize("tag", TAGS)
def test_positions_equal_ibot(ibot, tag):
    model, values = ibot
    height, width = values[f"{tag}_x"].shape[2:]
    table = model.position_table((height // 16, width // 16))
    torch.testing.assert_close(table, torch.from_numpy(values[f"{tag}_pos"]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("tag", TAGS)
@torch.no_grad()
def test_tokens_equal_ibot(ibot, tag):
    model, values = ibot
    images = torch.from_numpy(values[f"{tag}_x"])
    masks = torch.from_numpy(values[f"{tag}_mask"]).flatten(1)
    torch.testing.assert_close(model(images), torch.from_numpy(values[f"{tag}_plain_out"]), atol=2e-5, rtol=0)
    torch.testing.assert_close(model(images, masks), torch.from_numpy(values[f"{tag}_masked_out"]), atol=2e-5, rtol=0)


@torch.no_grad()
def test_packed_stream_equals_ibot(ibot):
    model, values = ibot
    crops = [torch.from_numpy(values[f"{tag}_x"]) for tag in TAGS]
    masks = [torch.from_numpy(values[f"{tag}_mask"]).flatten(1) for tag in TAGS]
    for tag, tokens in zip(TAGS, model.forward_packed(crops, masks), strict=True):
        torch.testing.assert_close(tokens, torch.from_numpy(values[f"{tag}_masked_out"]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("tag", TAGS)
@torch.no_grad()
def test_last_attention_equals_ibot(ibot, tag):
    model, values = ibot
    attention = model.last_attention(torch.from_numpy(values[f"{tag}_x"]))
    torch.testing.assert_close(attention, torch.from_numpy(values[f"{tag}_last_attn"]), atol=2e-5, rtol=0)


@torch.no_grad()
def test_intermediate_equals_ibot(ibot):
    model, values = ibot
    expected = torch.from_numpy(values["sq_inter2"])  # [2 layers, 3, 17, 96]
    layers = model.intermediate(torch.from_numpy(values["sq_x"]), 2)
    torch.testing.assert_close(torch.stack(layers), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_tokens_equal_published_fine_tuning_code(golden):
    values = golden("vit_small_forward")
    model = VisionTransformer((64, 32), embed_dim=96, depth=3, num_heads=3).eval()
    model.load_state_dict(_weights(values))
    images = torch.from_numpy(values["x"])
    torch.testing.assert_close(model(images), torch.from_numpy(values["tokens_norm"]), atol=2e-5, rtol=0)
    torch.testing.assert_close(model.embed(images), torch.from_numpy(values["out_cls"]), atol=2e-5, rtol=0)


@torch.no_grad()
def test_tokens_equal_timm():
    ours = VisionTransformer((64, 32), embed_dim=96, depth=4, num_heads=3).eval()
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=(64, 32), patch_size=16, embed_dim=96, depth=4, num_heads=3, num_classes=0, global_pool=""
    ).eval()
    with torch.no_grad():
        for parameter in ours.parameters():  # biases and norms too, so that a swapped one shows
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 64, 32)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)
