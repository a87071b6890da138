from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_weights import shaken

import personvit  # noqa: F401 registers the models
from personvit.errors import CheckpointError
from personvit.models import ReIDModel, build_vit, save_backbone, save_reid, vit_small, vit_tiny
from personvit.models.weight_convert import convert_weights

NAME = "personvit_{}_patch16_256x128"


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_state_dict_is_ours(size):
    theirs = timm.create_model(NAME.format(size), pretrained=False, num_classes=0)
    ours = build_vit(f"vit_{size}").state_dict()
    assert {name: value.shape for name, value in theirs.state_dict().items()} == {n: v.shape for n, v in ours.items()}


@torch.no_grad()
def test_outputs_are_ours():
    theirs = timm.create_model(NAME.format("small"), pretrained=False, num_classes=0).eval()
    ours = shaken(vit_small(), by=0.01)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 256, 128)
    tokens, expected = theirs.forward_features(images), ours(images)
    assert ((tokens - expected).norm() / expected.norm()).item() < 2e-6
    features = F.normalize(theirs(images)), F.normalize(ours.embed(images))
    torch.testing.assert_close(*features, atol=2e-6, rtol=0)
    # In float64 rounding is out of the way: the functions are the same.
    double = theirs.double().forward_features(images[:1].double()), ours.double()(images[:1].double())
    torch.testing.assert_close(*double, atol=1e-11, rtol=0)


def test_input_is_described():
    model = timm.create_model(NAME.format("tiny"))
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 256, 128)
    assert data["mean"] == pytest.approx((0.485, 0.456, 0.406))
    assert (data["interpolation"], data["crop_pct"]) == ("bilinear", 1.0)
    assert model.num_classes == 0
    assert set(timm.list_models("personvit*")) == {NAME.format(size) for size in ("tiny", "small", "base")}


def test_timm_arguments_work():
    model = timm.create_model(NAME.format("tiny"), features_only=True, out_indices=(1, 2))
    assert [tuple(part.shape) for part in model(torch.randn(1, 3, 256, 128))] == [(1, 192, 16, 8)] * 2
    other = timm.create_model(NAME.format("tiny"), img_size=(128, 64), num_classes=5, drop_path_rate=0.1)
    assert other(torch.randn(1, 3, 128, 64)).shape == (1, 5)


def test_pretrained_names_the_remedy():
    with pytest.raises(CheckpointError, match="personvit weights convert FILE --to timm"):
        timm.create_model(NAME.format("small"), pretrained=True)


def test_files_of_any_layout_load(tmp_path):
    backbone = shaken(vit_tiny())
    save_backbone(backbone, tmp_path / "ours.safetensors", {"mean": [0.1, 0.2, 0.3]})
    save_reid(ReIDModel(backbone, 5), tmp_path / "reid.safetensors")
    torch.save({"teacher": {f"backbone.{n}": v for n, v in backbone.state_dict().items()}}, tmp_path / "ibot.pth")
    for name, mean in (("ours.safetensors", 0.1), ("reid.safetensors", 0.5), ("ibot.pth", 0.485)):
        overlay = {"file": str(tmp_path / name)}
        model = timm.create_model(NAME.format("tiny"), pretrained=True, pretrained_cfg_overlay=overlay)
        assert torch.equal(model.norm.weight, backbone.norm.weight)
        assert model.pretrained_cfg["mean"][0] == pytest.approx(mean)
    convert_weights(tmp_path / "ibot.pth", "timm", tmp_path / "timm.safetensors")
    model = timm.create_model(NAME.format("tiny"), checkpoint_path=str(tmp_path / "timm.safetensors"))
    assert torch.equal(model.blocks[3].mlp.fc2.weight, backbone.blocks[3].mlp.fc2.weight)


def test_another_size_is_refused_and_another_image_resized(tmp_path):
    save_backbone(vit_tiny(), tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors")}
    with pytest.raises(CheckpointError, match=r"vit_tiny.*first difference"):
        timm.create_model(NAME.format("small"), pretrained=True, pretrained_cfg_overlay=overlay)
    model = timm.create_model(NAME.format("tiny"), pretrained=True, pretrained_cfg_overlay=overlay, img_size=(128, 64))
    assert model.pos_embed.shape == (1, 33, 192)


def test_camera_vectors_are_refused(tmp_path):
    save_reid(ReIDModel(vit_tiny(num_cameras=3), 5), tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors")}
    with pytest.raises(CheckpointError, match=r"camera vectors.*--backbone-only"):
        timm.create_model(NAME.format("tiny"), pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize("order", ["import personvit, timm", "import timm, personvit"])
def test_either_order_of_imports(order):
    code = f"{order}\nassert timm.is_model('personvit_small_patch16_256x128')"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def test_a_broken_installation_does_not_break_timm():
    code = (
        "import sys, warnings, personvit\n"
        "sys.modules['personvit.models.timm_models'] = None\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import timm\n"
        "assert any('not known to timm' in str(one.message) for one in seen)\n"
        "assert timm.is_model('vit_small_patch16_224')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
