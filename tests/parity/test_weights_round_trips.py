"""Every published layout -> ours -> the same layout: names, types and values bit for bit."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from tiny_weights import dinov2, ibot_checkpoint, plain, timm_classifier, transformer_120

from personvit.models import load_backbone
from personvit.models.weight_convert import convert_weights
from personvit.models.weight_files import read_weight_file


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def there_and_back(tmp_path, content, target, ending=".pth", **choice):
    """Through our safetensors, and that once more through itself."""
    torch.save(content, tmp_path / "published.pth")
    convert_weights(tmp_path / "published.pth", "safetensors", tmp_path / "ours.safetensors", **choice)
    convert_weights(tmp_path / "ours.safetensors", "safetensors", tmp_path / "again.safetensors")
    (first, described), (second, again) = (read_weight_file(tmp_path / f"{n}.safetensors") for n in ("ours", "again"))
    same(second, first)
    assert described == again
    back = tmp_path / f"back{ending}"
    convert_weights(tmp_path / "again.safetensors", target, back)
    return safetensors.torch.load_file(back) if ending == ".safetensors" else torch.load(back, weights_only=True)


@pytest.mark.parametrize("cameras", [0, 3])
def test_fine_tuned(tmp_path, cameras):
    content = transformer_120(num_cameras=cameras)
    assert len(content) == 30 + 2 + 5 + 1 + bool(cameras)
    same(there_and_back(tmp_path, content, "transreid"), content)


def test_pretraining_teacher(tmp_path):
    content = ibot_checkpoint()
    back = there_and_back(tmp_path, content, "ibot")
    same(back["teacher"], content["teacher"])
    assert back.keys() == {"teacher", "epoch", "args"}
    assert back["epoch"] == 221
    assert back["args"] == {"arch": "vit_small", "patch_size": 16, "lr": 5e-4, "global_crops_scale": [0.4, 1.0]}


def test_pretraining_student(tmp_path):
    content = ibot_checkpoint()
    back = there_and_back(tmp_path, content, "ibot", network="student")
    same(back["student"], content["student"])
    # For readers that take the teacher only; a teacher has no mask token.
    expected = {name.removeprefix("module."): value for name, value in content["student"].items()}
    del expected["backbone.masked_embed"]
    same(back["teacher"], expected)


@pytest.mark.parametrize("make", [plain, timm_classifier, dinov2])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_timm_and_dinov2(tmp_path, make, ending):
    content = make()
    same(there_and_back(tmp_path, content, "timm", ending), content)


def test_transreid_ssl_backbone(tmp_path):
    content = plain()
    same(there_and_back(tmp_path, content, "transreid"), content)


@pytest.mark.parametrize("target", ["transreid", "ibot", "timm", "safetensors"])
@pytest.mark.parametrize("make", [plain, dinov2, ibot_checkpoint, transformer_120])
def test_backbone_is_the_same_in_every_layout(tmp_path, make, target):
    torch.save(make(), tmp_path / "a.pth")
    out = tmp_path / ("b.safetensors" if target == "safetensors" else "b.pth")
    convert_weights(tmp_path / "a.pth", target, out)
    same(load_backbone(out)[0], load_backbone(tmp_path / "a.pth")[0])
