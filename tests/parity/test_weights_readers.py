"""Files that we write, read by the published readers as the specification describes them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_weights import SIZE, dinov2, ibot_checkpoint, plain, tiny_reid, tiny_vit, transformer_120

from personvit.models import VisionTransformer, load_backbone, load_model, save_backbone, save_reid
from personvit.models.weight_convert import convert_weights


def load_param(model, path, hw_ratio):
    """hustvl/PersonViT TransReID.load_param: unwrap, keep the teacher's backbone, skip heads, resize, copy."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict", "module"):
        if wrapper in content:
            content = content[wrapper]
    if "teacher" in content:
        teacher = {name.replace("module.", ""): value for name, value in content["teacher"].items()}
        content = {n.replace("backbone.", ""): v for n, v in teacher.items() if n.startswith("backbone.")}
    own, copied, unknown = model.state_dict(), set(), set()
    for name, value in content.items():
        if "head" in name or "dist" in name or "pre_logits" in name:
            continue
        if name not in own:
            unknown.add(name)
            continue
        if name == "pos_embed" and value.shape != own[name].shape:
            cells = value.shape[1] - 1
            rows = int(math.sqrt(cells * hw_ratio))
            grid = value[:, 1:].reshape(1, rows, rows // hw_ratio, -1).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, size=model.grid, mode="bilinear", align_corners=False)
            value = torch.cat([value[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
        own[name].copy_(value)
        copied.add(name)
    return copied, unknown


def load_trained(model, path):
    """hustvl/PersonViT, loading for the test: every entry of the flat file is copied under its own name."""
    own = model.state_dict()
    failed = []
    for name, value in torch.load(path, map_location="cpu", weights_only=True).items():
        try:
            own[name.replace("module.", "")].copy_(value)
        except (KeyError, RuntimeError):  # the published reader skips these in silence
            failed.append(name)
    return sorted(failed)


@pytest.mark.parametrize("target", ["ibot", "transreid"])
@pytest.mark.parametrize("make", [plain, ibot_checkpoint, dinov2])
def test_pretraining_reader(tmp_path, make, target):
    torch.save(make(), tmp_path / "a.pth")
    convert_weights(tmp_path / "a.pth", target, tmp_path / "b.pth")
    expected = load_model(tmp_path / "a.pth")
    model = tiny_vit(img_size=expected.img_size, patch_size=expected.patch_size)
    copied, unknown = load_param(model, tmp_path / "b.pth", hw_ratio=2)
    assert copied == model.state_dict().keys()
    assert not unknown
    images = torch.randn(2, 3, *expected.img_size)
    with torch.no_grad():
        assert torch.equal(model(images), expected(images))


def test_our_export_in_the_pretraining_reader_at_another_size(tmp_path):
    save_backbone(tiny_vit(img_size=(128, 64)), tmp_path / "ours.safetensors")
    convert_weights(tmp_path / "ours.safetensors", "ibot", tmp_path / "b.pth")
    model = tiny_vit()
    load_param(model, tmp_path / "b.pth", hw_ratio=2)
    ours = load_backbone(tmp_path / "ours.safetensors", SIZE)[0]["pos_embed"]
    torch.testing.assert_close(model.pos_embed.detach(), ours, atol=1e-6, rtol=0)


def test_our_fine_tuned_export_in_the_test_reader(tmp_path):
    trained = tiny_reid()
    save_reid(trained, tmp_path / "best.safetensors")
    convert_weights(tmp_path / "best.safetensors", "transreid", tmp_path / "transformer_120.pth")
    model = tiny_reid()
    assert load_trained(model, tmp_path / "transformer_120.pth") == []
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(images), trained(images), strict=True))


def test_published_fine_tuned_file_through_ours(tmp_path):
    torch.save(transformer_120(), tmp_path / "a.pth")
    convert_weights(tmp_path / "a.pth", "safetensors", tmp_path / "ours.safetensors")
    convert_weights(tmp_path / "ours.safetensors", "transreid", tmp_path / "b.pth")
    assert load_trained(tiny_reid(), tmp_path / "b.pth") == ["base.fc.bias", "base.fc.weight"]  # our model has no fc


def test_student_is_read_as_the_teacher(tmp_path):
    content = ibot_checkpoint()
    torch.save(content, tmp_path / "a.pth")
    convert_weights(tmp_path / "a.pth", "ibot", tmp_path / "b.pth", network="student")
    model = VisionTransformer(SIZE, embed_dim=64, depth=2, num_heads=1)
    assert load_param(model, tmp_path / "b.pth", hw_ratio=2) == (model.state_dict().keys(), set())
    assert torch.equal(model.norm.weight, content["student"]["module.backbone.norm.weight"])
